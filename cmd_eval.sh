#!/usr/bin/env bash
# Evaluates a model, with or without an adapter, and prints the table of all evaluations in the results folder.
#
#   bash cmd_eval.sh                                                          SmolLM2-135M and the adapters of cmd_grun.sh
#   PROFILE=demo bash cmd_eval.sh                                             the demo's taught model and its adapters
#   BASE_OR_REFT=base MODEL=taught/model PROFILE=llama3.1 DATA_DIR=tofu bash cmd_eval.sh
#   BASE_OR_REFT=reft REFT_PATH=results/llama3.1/gd MODEL=taught/model PROFILE=llama3.1 DATA_DIR=tofu bash cmd_eval.sh
#   QUANT=8bit bash cmd_eval.sh                                               the same, the weights quantized
#
# Variables of the published script:
#   BASE_OR_REFT  base: MODEL as it is. reft: MODEL with the adapter REFT_PATH. Not given, REFT_PATH neither: the model
#                 as it is, then with every adapter that cmd_grun.sh left in RESULTS
#   REFT_PATH     folder or hub id of an adapter
#   JSON_FILE     the forget split, such as forget05 (data.forget)
#   USE_LORA      lora: MODEL with the LoRA adapter LORA_PATH, a folder that PEFT wrote
#   QUANT         8bit, 4bit (nf4) or fp4 (the published 4bit): MODEL quantized by bitsandbytes, which must be installed;
#                 the results are called NAME-QUANT
#   DATA_TASK     normal (answers), base (paraphrased answers) or perturb (wrong answers): score only these
#                 ("no" and "None" count as not given)
#
# Ours (relative paths are relative to the repository's folder):
#   PROFILE       settings to start from (default smollm2; `python -m grun list profiles`), or a YAML file
#   MODEL         name, folder or hub id of the model; needed with every profile but smollm2, which names it, and the
#                 demo's, whose taught model is found again, or taught
#   DATA_DIR      folder of the data (data.path)
#   RESULTS       folder that gets evaluation/NAME: before, or the adapter's folder name (default results/PROFILE)
#   DRY_RUN       1: print the commands instead, one a line
#
# Arguments: key=value, an option of `python -m grun evaluate` (see its --help); evaluate.key=value is the same, and in
# the demo data.key=value goes to finetune too, whose options are finetune.key=value. All are checked before
# anything runs; unknown ones end it with status 2.
set -euo pipefail
cd "$(dirname "$0")"
. scripts/stages.sh

PROFILE=${PROFILE:-smollm2}
MODEL=${MODEL:-$(model_of_profile "$PROFILE")}
RESULTS=${RESULTS:-results/$(basename "$PROFILE" .yaml)}
REFT_PATH=${REFT_PATH:-}
BASE_OR_REFT=${BASE_OR_REFT:-}
if [ -z "$BASE_OR_REFT" ] && [ -n "$REFT_PATH" ]; then BASE_OR_REFT=reft; fi
STAGES="evaluate report"
DEFAULT_STAGE=evaluate
if [ -z "$MODEL" ] && [ "$PROFILE" = demo ]; then STAGES="finetune $STAGES"; fi
read_overrides "$@"

given() { case "${1:-}" in '' | no | None) return 1 ;; esac; }

suffix=
if given "${QUANT:-}"; then
  evaluate_overrides=("model.quantization=$QUANT" ${evaluate_overrides[@]+"${evaluate_overrides[@]}"})
  suffix=-$QUANT
fi
if given "${DATA_TASK:-}"; then
  case "$DATA_TASK" in
    normal) scored=answer ;;
    base) scored=paraphrase ;;
    perturb) scored=perturbed ;;
    *) refuse "DATA_TASK=$DATA_TASK; expected normal, base or perturb" ;;
  esac
  evaluate_overrides=("continuations=[$scored]" ${evaluate_overrides[@]+"${evaluate_overrides[@]}"})
fi
if given "${USE_LORA:-}"; then
  given "${LORA_PATH:-}" || refuse "USE_LORA=$USE_LORA needs LORA_PATH, the folder of a LoRA adapter"
  [ -z "$REFT_PATH" ] || refuse "USE_LORA and REFT_PATH name two adapters; give one of them"
  BASE_OR_REFT=reft
  REFT_PATH=$LORA_PATH
elif given "${LORA_PATH:-}"; then
  refuse "LORA_PATH=$LORA_PATH needs USE_LORA=lora"
fi
case "$BASE_OR_REFT" in
  '' | base) ;;
  reft) [ -n "$REFT_PATH" ] || refuse "BASE_OR_REFT=reft needs REFT_PATH, the folder of an adapter" ;;
  *) refuse "BASE_OR_REFT=$BASE_OR_REFT; expected base or reft" ;;
esac
if [ -z "$MODEL" ] && [ "$PROFILE" != demo ]; then
  refuse "PROFILE=$PROFILE needs MODEL, the folder or hub id of the model to evaluate"
fi
if [ -n "${JSON_FILE:-}" ]; then
  evaluate_overrides=("data.forget=$JSON_FILE" ${evaluate_overrides[@]+"${evaluate_overrides[@]}"})
fi

if dry_run; then NEED_SETUP=0; fi
. scripts/environment.sh

if [ -z "$MODEL" ]; then
  finetune_command all
  check_command
fi
evaluate_command "${MODEL:-models/taught}" "before$suffix"
check_command
report_command
check_command

if [ -f "$RESULTS/evaluation/retain_only/evaluation.json" ]; then REFERENCE=$RESULTS/evaluation/retain_only; fi
if [ -z "$MODEL" ]; then
  teach all
  MODEL=$TAUGHT
fi
adapters=()
if [ -z "$BASE_OR_REFT" ]; then
  for settings in "$RESULTS"/*/adapter_config.json; do
    if [ -f "$settings" ]; then adapters+=("$(dirname "$settings")"); fi
  done
fi
if [ "$BASE_OR_REFT" = reft ]; then
  evaluate_command "$MODEL" "$(basename "$REFT_PATH")$suffix" "$REFT_PATH"
  run_stage "evaluate: $REFT_PATH"
elif [ ${#adapters[@]} -gt 0 ]; then
  evaluate_adapters_command "$MODEL" "$suffix" "${adapters[@]}"
  run_stage "evaluate: $MODEL ${adapters[*]}"
else
  evaluate_command "$MODEL" "before$suffix"
  run_stage "evaluate: $MODEL"
fi
befores=("$RESULTS"/evaluation/before*/evaluation.json)
if dry_run || [ -f "${befores[0]}" ]; then
  report_command
  run_stage report
else
  say "evaluated: $RESULTS/evaluation; no table, since the model as it is has not been: BASE_OR_REFT=base does that"
fi
