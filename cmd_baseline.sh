#!/usr/bin/env bash
# Every objective under every parametrization (fine-tuning of all weights, LoRA, plain ReFT, GRUN), compared by one
# table: unlearn a part of what a model knows in every combination, evaluate each, print the matrix.
#
#   bash cmd_baseline.sh                                                      a real chat model and countries; on the CPU
#   PROFILE=demo SEEDS="42 43 44" PARAMETRIZATIONS="full lora reft grun" bash cmd_baseline.sh    a tiny model, taught first
#   PROFILE=llama3.1 MODEL=taught/model DATA_DIR=tofu bash cmd_baseline.sh    a real model that was already taught TOFU
#
# What is done is found again: the same command goes on after any end, and tries again what failed.
#
# Variables (relative paths are relative to the repository's folder):
#   PROFILE           settings to start from (default smollm2; `python -m grun list profiles`), or a YAML file
#   SWEEP             the sweep, with its options and the settings that were chosen for each cell: smollm2, demo, tofu_small,
#                     llama3.1, mistral, or a YAML file (docs/sweep.md). Default: the one called like PROFILE
#   MODEL             name, folder or hub id of a model that already knows the corpus: nothing is taught. Default: smollm2
#                     with that profile; with others the profile's own base model is taught first (or found again).
#   RETAIN_MODEL      the same, never taught the forget set: the row to aim for. Not given: taught in the demo or with
#                     RETAIN_ONLY=1; left out if MODEL is given, or otherwise.
#   RETAIN_ONLY       1 or 0: teach the retain-only model or not (default 1 in the demo, else 0)
#   DATA_DIR          folder of the data (data.path)
#   RESULTS           folder of all results (default results/PROFILE-baselines)
#   OBJECTIVES        default "gd idk npo" (`python -m grun list objectives`)
#   PARAMETRIZATIONS  default "full lora grun" (`python -m grun list parametrizations`); system_prompt, in_context and
#                     output_filter train nothing, and have one cell each; task_vector has one a seed
#   SEEDS             default 42
#   JOBS              cells at a time (default 2 in the demo, else 1)
#   LAUNCHER          command that gets each cell's at {command}, such as "sbatch --wrap '{command}'"; default: none
#   TUNE              1: try the sweep's grid of settings, and write RESULTS/tune/tune.md and RESULTS/tune/tuned.yaml
#   DRY_RUN           1: print the commands instead, one a line
#
# Arguments:
#   stage.key=value   an option of one stage: finetune, unlearn, evaluate or sweep (`python -m grun STAGE --help`)
#   data.key=value    goes to finetune, unlearn and evaluate alike: they must see the same corpus
#   key=value         goes to unlearn: train.epochs=20
# All stages' options are checked before anything runs; unknown ones end it with status 2.
set -euo pipefail
cd "$(dirname "$0")"
. scripts/stages.sh

PROFILE=${PROFILE:-smollm2}
SWEEP=${SWEEP:-$(basename "$PROFILE" .yaml)}
MODEL=${MODEL:-$(model_of_profile "$PROFILE")}
RETAIN_MODEL=${RETAIN_MODEL:-}
RESULTS=${RESULTS:-results/$(basename "$PROFILE" .yaml)-baselines}
OBJECTIVES=${OBJECTIVES:-gd idk npo}
PARAMETRIZATIONS=${PARAMETRIZATIONS:-full lora grun}
SEEDS=${SEEDS:-42}
if [ -z "${JOBS:-}" ]; then
  if [ "$PROFILE" = demo ]; then JOBS=2; else JOBS=1; fi
fi
STAGES="finetune unlearn evaluate sweep"
DEFAULT_STAGE=unlearn
if [ -n "$MODEL" ]; then STAGES="unlearn evaluate sweep"; fi
read_overrides "$@"
if dry_run; then NEED_SETUP=0; fi
given_threads=${OMP_NUM_THREADS:-}
. scripts/environment.sh

choose_reference

# Everything wrong with the options shows here.
if [ -z "$MODEL" ]; then
  finetune_command all
  check_command
fi
sweep_command "${MODEL:-models/taught}" "$RETAIN_MODEL"
check_command

teach_models
if [ -z "$given_threads" ]; then  # two cells with two threads each on two cores are ten times slower
  export OMP_NUM_THREADS=$((OMP_NUM_THREADS > JOBS ? OMP_NUM_THREADS / JOBS : 1))
fi
sweep_command "$MODEL" "$RETAIN_MODEL"
run_stage "sweep: $OBJECTIVES x $PARAMETRIZATIONS x $SEEDS"
if ! dry_run; then say "== done (after $SECONDS s)"; fi
