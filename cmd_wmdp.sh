#!/usr/bin/env bash
# Hazardous knowledge: unlearn a forget corpus by several methods, and measure multiple choice, sentences to complete and
# everything else before and after.
#
#   bash cmd_wmdp.sh                                         the demo: a tiny model, an invented mineral's lore, on the CPU
#   PROFILE=smollm2 bash cmd_wmdp.sh                         a real model, SmolLM2, and the elements it knows; on the CPU
#   PROFILE=llama3.1 DATA_DIR=corpora bash cmd_wmdp.sh       the published settings on real models (docs/wmdp.md)
#
# Variables (relative paths are relative to the repository's folder):
#   PROFILE       demo (default), smollm2, llama3.1, mistral, zephyr, crystalchat or alpaca
#   METHODS       what is run, of: rmu grun_rmu max_entropy min_posterior random_mapping; with smollm2 also grun_LOSS of
#                 each (the published gate) and grun_LOSS_pooled. Default: all in the demo and with smollm2;
#                 llama3.1, mistral: rmu grun_rmu; zephyr, alpaca: rmu; crystalchat: max_entropy
#   ALPHAS        alpaca: retain weights of RMU, one run each (default "0 1 10 100 1000", where the published run called
#                 1000 had 1200: write 1200 for that one)
#   MODEL         name, folder or hub id of the model (default: the profile's; in the demo one is taught first)
#   RETAIN_MODEL  the same, never taught what is to be forgotten: the row to aim for (the demo teaches one)
#   SEED          of all methods (default 42)
#   JOBS          methods at a time (default: demo and smollm2 2, else 1)
#   DATA_DIR      folder of corpora and questions; what is not there is asked of the hub. alpaca: of PKU-SafeRLHF's rows;
#                 smollm2: where its corpora are, or are made (default RESULTS/corpora)
#   RESULTS       folder of everything that is made (default results/wmdp-PROFILE)
#   TRUST_REMOTE_CODE   1: run the code that comes with a model; CrystalChat needs it
#   DRY_RUN       1: print the commands instead, one a line
#
# Arguments:
#   stage.key=value   an option of one stage: finetune, unlearn, evaluate or report (`python -m grun STAGE --help`)
#   data.key=value    goes to finetune, unlearn and evaluate alike
#   overwrite=true    goes to unlearn and evaluate
#   key=value         goes to unlearn, that is to grun_rmu
# Options of the other methods are their tools' own flags: python -m baselines.rmu, python -m baselines.llm360.
set -euo pipefail
cd "$(dirname "$0")"
. scripts/stages.sh
. scripts/published.sh

NAME=${PROFILE:-demo}
known_profile "$NAME"
PROFILE=wmdp_$NAME
RESULTS=${RESULTS:-results/wmdp-$NAME}
METHODS=${METHODS:-$(methods_of "$NAME")}
ALPHAS=${ALPHAS:-0 1 10 100 1000}
JOBS=${JOBS:-$(jobs_of "$NAME")}
SEED=${SEED:-42}
MODEL=${MODEL:-$(model_of "$NAME")}
RETAIN_MODEL=${RETAIN_MODEL:-}
CORPORA=$RESULTS/corpora
if [ "$NAME" = smollm2 ]; then
  CORPORA=${DATA_DIR:-$CORPORA}
  DATA_DIR=$CORPORA
fi
STAGES="unlearn evaluate report"
if [ -z "$MODEL" ]; then STAGES="finetune $STAGES"; fi
DEFAULT_STAGE=unlearn
for method in $METHODS; do known_method "$NAME" "$method"; done
read_overrides "$@"
unlearn_overrides=("seed=$SEED" ${unlearn_overrides[@]+"${unlearn_overrides[@]}"}) # a seed=N that is given counts
if [ "${TRUST_REMOTE_CODE:-0}" != 0 ]; then
  add_override evaluate model.trust_remote_code=true
  add_override unlearn model.trust_remote_code=true
fi
if dry_run; then NEED_SETUP=0; fi
. scripts/environment.sh

# method_command METHOD MODEL: sets COMMAND and FOLDER, where the result will be; `rmu:ALPHA` is rmu with that weight.
method_command() {
  FOLDER=$RESULTS/${1//:/_alpha_}
  case "$1" in
    grun_*)
      local objective=${1#grun_}
      unlearn_command "$2" "${objective%_pooled}" "$1"
      if [ "$NAME" = smollm2 ]; then
        case "$1" in *_pooled) COMMAND+=(design=pooled) ;; *) COMMAND+=(design=published) ;; esac
      fi ;;
    rmu) rmu_command "$NAME" "$2" "$FOLDER" ;;
    rmu:*) rmu_command "$NAME" "$2" "$FOLDER" "${1#rmu:}" ;;
    *)
      llm360_command "$NAME" "$2" "$1" "$RESULTS/llm360"
      FOLDER="$RESULTS/llm360/<$1>" ;;
  esac
}

runs=()
for method in $METHODS; do
  if [ "$NAME/$method" = alpaca/rmu ]; then
    for alpha in $ALPHAS; do runs+=("rmu:$alpha"); done
  else
    runs+=("$method")
  fi
done

# Everything wrong with the options shows here.
reference=none
if [ -n "$RETAIN_MODEL" ]; then reference=given; fi
if [ -z "$MODEL" ]; then
  if [ $reference = none ]; then reference=taught; fi
  finetune_command all models/taught
  check_command
fi
for run in "${runs[@]}"; do
  method_command "$run" "${MODEL:-models/taught}"
  check_command
done
evaluate_command "${MODEL:-models/taught}" before
check_command
report_command
check_command

if corpora_command "$NAME"; then run_stage corpora; fi
if [ -z "$MODEL" ]; then
  teach_in_turn # which evaluates too
else
  evaluate_command "$MODEL" before
  if [ "$NAME" = demo ]; then COMMAND+=("${KNOWN[@]}"); fi
  run_stage "evaluate: before"
fi
if [ $reference != none ]; then
  evaluate_command "$RETAIN_MODEL" retain_only
  run_stage "evaluate: retain_only"
fi
# run_method RUN: unlearn and evaluate.
run_method() {
  local name=${1//:/_alpha_}
  method_command "$1" "$MODEL"
  run_for_folder "unlearn: $name"
  case "$1 ${COMMAND[*]}" in
    grun_* | *"--save delta"*) evaluate_command "$MODEL" "$name" "$FOLDER" ;;
    *) evaluate_command "$FOLDER" "$name" ;;
  esac
  run_stage "evaluate: $name"
}

at_once "$JOBS" run_method "${runs[@]}"
report_command
run_stage report
if ! dry_run; then say "== done (after $SECONDS s)"; fi
