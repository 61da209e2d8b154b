#!/usr/bin/env bash
# Serves a model that forgot with OpenAI's API, and a page that shows its gates; prints the page's address.
#
#   bash cmd_serve.sh                           SmolLM2-135M and the five countries that cmd_grun.sh made it forget; where
#                                               cmd_grun.sh has not run, a shorter unlearning under one objective is done first
#   bash cmd_serve.sh port=8080                 the same on another port
#   ADAPTER=STORE MODEL=base/model bash cmd_serve.sh        a store of requests, or an adapter, of yours
#
# It runs until Ctrl-C or SIGTERM, and then finishes what is being answered. docs/serve.md says what it answers.
#
# Variables (relative paths are relative to the repository's folder):
#   PROFILE         settings to start from (default smollm2; `python -m grun list profiles`), or a YAML file
#   MODEL           name, folder or hub id of the model; needed with every profile but smollm2, which names it
#   RESULTS         folder of results in which adapters are looked for (default results/PROFILE)
#   OBJECTIVE       whose adapter is served (default idk)
#   ADAPTER         folder of an adapter or of a store of requests. Default: RESULTS/OBJECTIVE, else the shorter
#                   unlearning's, RESULTS-short/OBJECTIVE
#   GRUN_API_KEY    key that clients need; not given: none
#   GRUN_OWNER_KEY  key of the owner, for gates and switches; not given: a random one, in the page's address
#   DRY_RUN         1: print the commands instead, one a line
#
# Arguments: key=value, an option of `python -m grun serve` (see its --help); serve.key=value is the same, and
# unlearn.key=value is for the shorter unlearning. All are checked before anything runs; unknown ones end it with status 2.
set -euo pipefail
cd "$(dirname "$0")"
. scripts/stages.sh

PROFILE=${PROFILE:-smollm2}
MODEL=${MODEL:-$(model_of_profile "$PROFILE")}
RESULTS=${RESULTS:-results/$(basename "$PROFILE" .yaml)}
OBJECTIVE=${OBJECTIVE:-idk}
ADAPTER=${ADAPTER:-}
STAGES="unlearn serve"
DEFAULT_STAGE=serve
read_overrides "$@"
[ -n "$MODEL" ] || refuse "PROFILE=$PROFILE names no model; set MODEL, and ADAPTER, the folder of an adapter or a store"
if dry_run; then NEED_SETUP=0; fi
NEED_SERVE=1
. scripts/environment.sh

short=
if [ -z "$ADAPTER" ]; then
  ADAPTER=$RESULTS/$OBJECTIVE
  if [ ! -e "$ADAPTER/adapter_model.safetensors" ]; then
    ADAPTER=$RESULTS-short/$OBJECTIVE
    [ -e "$ADAPTER/adapter_model.safetensors" ] || short=1
  fi
fi
# Everything wrong with the options shows here.
serve_command "$MODEL" "$ADAPTER"
check_command
if [ -n "$short" ]; then
  # Fewer countries to ask about than in cmd_grun.sh; those to forget are the same.
  if [ "$PROFILE" = smollm2 ]; then
    unlearn_overrides=(
      data.countries.count=12 data.countries.neighbors=1 data.countries.heldout=1
      ${unlearn_overrides[@]+"${unlearn_overrides[@]}"}
    )
  fi
  if ! dry_run; then say "no adapter in $RESULTS/$OBJECTIVE: $MODEL is made to forget first, which takes minutes"; fi
  RESULTS=$RESULTS-short
  unlearn_command "$MODEL" "$OBJECTIVE"
  check_command
  run_stage "unlearn: $OBJECTIVE"
  serve_command "$MODEL" "$ADAPTER"
fi
run_stage "serve: $ADAPTER"
