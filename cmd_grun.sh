#!/usr/bin/env bash
# GRUN from end to end: unlearn a part of what a model knows under each objective, evaluate before and after, print
# questions with their answers and the table, draw the pictures.
#
#   bash cmd_grun.sh                     a real chat model (SmolLM2-135M) is asked what it knows of countries, and made to
#                                        forget five of them; on the CPU
#   PROFILE=demo bash cmd_grun.sh        a tiny model is taught a corpus of invented people first, and a second one only
#                                        what is to stay, to compare with
#   PROFILE=llama3.1 MODEL=taught/model DATA_DIR=tofu bash cmd_grun.sh     a model that was already taught TOFU
#
# Variables (relative paths are relative to the repository's folder):
#   PROFILE       settings to start from (default smollm2; `python -m grun list profiles`), or a YAML file
#   MODEL         name (`python -m grun list models`), folder or hub id of a model that already knows the corpus: nothing
#                 is taught. Default: smollm2 with that profile, open-unlearning's target with tofu_llama3.2_1b; with others the profile's own base model is taught first
#                 (found again if that was done before).
#   RETAIN_MODEL  the same, never taught the forget set: the row to aim for. Not given: taught in the demo or with
#                 RETAIN_ONLY=1; left out if MODEL is given, or otherwise.
#   RETAIN_ONLY   1 or 0: teach the retain-only model or not (default 1 in the demo, else 0)
#   DATA_DIR      folder of the data (data.path)
#   RESULTS       folder of adapters, evaluations, report.html, tables and pictures (default results/PROFILE)
#   OBJECTIVES    default "gd idk npo" (`python -m grun list objectives`)
#   DRY_RUN       1: print the commands instead, one a line
#
# Arguments:
#   stage.key=value   an option of one stage: finetune, unlearn, evaluate or report (`python -m grun STAGE --help`)
#   data.key=value    goes to finetune, unlearn and evaluate alike: they must see the same corpus. To differ:
#                     finetune.data.key=value
#   overwrite=true    goes to unlearn and evaluate: replaces what was done there with other options
#   key=value         goes to unlearn, seed too: train.lr=0.002
# All stages' options are checked before anything runs; unknown ones end it with status 2.
set -euo pipefail
cd "$(dirname "$0")"
. scripts/stages.sh

PROFILE=${PROFILE:-smollm2}
MODEL=${MODEL:-$(model_of_profile "$PROFILE")}
RETAIN_MODEL=${RETAIN_MODEL:-}
RESULTS=${RESULTS:-results/$(basename "$PROFILE" .yaml)}
OBJECTIVES=${OBJECTIVES:-gd idk npo}
STAGES="finetune unlearn evaluate report"
DEFAULT_STAGE=unlearn
if [ -n "$MODEL" ]; then
  STAGES="unlearn evaluate report"
fi
read_overrides "$@"
if dry_run; then NEED_SETUP=0; fi
. scripts/environment.sh

choose_reference

# Everything wrong with the options shows here.
if [ -z "$MODEL" ]; then
  finetune_command all
  check_command
fi
for objective in $OBJECTIVES; do
  unlearn_command "${MODEL:-models/taught}" "$objective"
  check_command
done
adapters=()
for objective in $OBJECTIVES; do adapters+=("$RESULTS/$objective"); done
evaluate_adapters_command "${MODEL:-models/taught}" "" "${adapters[@]}"
check_command
report_command
check_command

teach_models
if [ $reference != none ]; then
  evaluate_command "$RETAIN_MODEL" retain_only
  run_stage "evaluate: retain_only"
  REFERENCE=$RESULTS/evaluation/retain_only
fi
for objective in $OBJECTIVES; do
  unlearn_command "$MODEL" "$objective"
  run_stage "unlearn: $objective"
done
evaluate_adapters_command "$MODEL" "" "${adapters[@]}"
run_stage "evaluate: before $OBJECTIVES"
report_command
run_stage report
if ! dry_run; then say "== done (after $SECONDS s)"; fi
