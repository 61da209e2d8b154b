#!/usr/bin/env bash
# Teaches a model the corpus that will be unlearned later, and prints the folder of the taught model. What was taught
# before, with the same data and settings, is found again at once.
#
#   bash cmd_finetune.sh                                                              the demo: a tiny model, on the CPU
#   PROFILE=llama3.1 MODEL=meta-llama/Llama-3.1-8B DATA_DIR=tofu bash cmd_finetune.sh
#
# Variables (relative paths are relative to the repository's folder):
#   PROFILE       settings to start from (default demo; `python -m grun list profiles`), or a YAML file
#   MODEL         name, folder or hub id of the model to teach (default: the profile's)
#   DATA_DIR      folder of the data (data.path)
#   RETAIN_ONLY   1 or 0: also teach a model everything but the forget set, the reference that unlearning is compared
#                 with; its folder is printed second (default 1 in the demo, else 0)
#   DRY_RUN       1: print the commands instead, one a line
#
# Arguments: key=value, an option of `python -m grun finetune` (see its --help); finetune.key=value is the same. All are
# checked before anything runs; unknown ones end it with status 2.
set -euo pipefail
cd "$(dirname "$0")"
. scripts/stages.sh

PROFILE=${PROFILE:-demo}
STAGES=finetune
DEFAULT_STAGE=finetune
read_overrides "$@"
if dry_run; then NEED_SETUP=0; fi
. scripts/environment.sh

subsets=all
if wants_retain_only; then subsets="all without_forget"; fi
for subset in $subsets; do
  finetune_command "$subset" "${MODEL:-}"
  check_command
done
for subset in $subsets; do
  teach "$subset" "${MODEL:-}"
  if ! dry_run; then echo "$TAUGHT"; fi
done
