# Shell functions that the cmd_*.sh share, but for cmd_test.sh: where an
# override goes, how a stage's command line is made, checked, printed or run. The cmd_*.sh sets, before `read_overrides`:
#   STAGES         the stages it runs, of: finetune unlearn evaluate sweep report serve
#   DEFAULT_STAGE  the one that a bare key=value goes to

finetune_overrides=()
unlearn_overrides=()
evaluate_overrides=()
report_overrides=()
sweep_overrides=()
serve_overrides=()

say() { printf '%s\n' "$*" >&2; }

# Wrong use: one line, exit status 2.
refuse() {
  say "error: $*"
  exit 2
}

dry_run() { [ "${DRY_RUN:-0}" != 0 ]; }

# Prints the comment at the head of script $1.
print_help() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$1"
}

runs_stage() {
  case " $STAGES " in *" $1 "*) return 0 ;; *) return 1 ;; esac
}

# add_override STAGE KEY=VALUE
add_override() {
  runs_stage "$1" || refuse "$1.$2: stage $1 does not run here (these do: $STAGES)"
  case "$2" in
    profile=*) refuse "set the profile for all stages: PROFILE=${2#*=} bash $(basename "$0")" ;;
    objective=*) refuse "set the objectives with OBJECTIVES=\"${2#*=}\" bash $(basename "$0")" ;;
    sweep=* | model=* | retain_model=* | objectives=* | parametrizations=* | seeds=* | jobs=* | launcher=* | tune=*)
      refuse "${2%%=*} is set by this script; the comment at its head names the variable (--help prints it)" ;;
    output_dir=* | results_dir=* | adapter=* | adapters=* | with_base=* | suffix=* | data.subset=*)
      refuse "${2%%=*} is set by this script (RESULTS=folder moves results; python -m grun $1 takes it freely)" ;;
    model.path=*)
      if [ "$1" != finetune ]; then refuse "set the model for all stages: MODEL=${2#*=} bash $(basename "$0")"; fi ;;
  esac
  case "$1" in
    finetune) finetune_overrides+=("$2") ;;
    unlearn) unlearn_overrides+=("$2") ;;
    evaluate) evaluate_overrides+=("$2") ;;
    report) report_overrides+=("$2") ;;
    sweep) sweep_overrides+=("$2") ;;
    serve) serve_overrides+=("$2") ;;
  esac
}

# add_override_to "STAGE ..." KEY=VALUE: those of the stages that run get it; if none does, DEFAULT_STAGE.
add_override_to() {
  local stage told=
  for stage in $1; do
    if runs_stage "$stage"; then
      add_override "$stage" "$2"
      told="$told $stage"
    fi
  done
  if [ -z "$told" ]; then
    add_override "$DEFAULT_STAGE" "$2"
  else
    say "$2 goes to:$told"
  fi
}

# `stage.key=value` goes to that stage. A bare `data.key=value` goes to every stage that reads data: they must see the
# same corpus. A bare `overwrite=true` goes to unlearn and evaluate, since the evaluation of another adapter is another
# one, but no model is taught anew. Any other `key=value` goes to DEFAULT_STAGE. Only the six stage names are stages:
# train.lr is a key.
read_overrides() {
  local argument key
  for argument in "$@"; do
    key=${argument%%=*}
    case "$argument" in
      -h | --help) print_help "$(basename "$0")"; exit 0 ;;
      -* | =*) refuse "unknown option $argument; expected key=value, stage.key=value or --help" ;;
      *=*) ;;
      *) refuse "cannot read '$argument'; expected key=value or stage.key=value" ;;
    esac
    case "$key" in
      finetune.* | unlearn.* | evaluate.* | report.* | sweep.* | serve.*) add_override "${key%%.*}" "${argument#*.}" ;;
      data.*) add_override_to "finetune unlearn evaluate" "$argument" ;;
      overwrite) add_override_to "unlearn evaluate" "$argument" ;;
      *) add_override "$DEFAULT_STAGE" "$argument" ;;
    esac
  done
}

# The functions *_command put a stage's arguments into the array COMMAND, and the program that gets them into MODULE.
# ${x[@]+"${x[@]}"} is "${x[@]}" that bash 3.2 accepts for an empty array under set -u.

# finetune_command SUBSET [BASE_MODEL]
finetune_command() {
  MODULE=grun
  COMMAND=(finetune "profile=$PROFILE")
  if [ -n "${2:-}" ]; then COMMAND+=("model.path=$2"); fi
  if [ -n "${DATA_DIR:-}" ]; then COMMAND+=("data.path=$DATA_DIR"); fi
  COMMAND+=("data.subset=$1" ${finetune_overrides[@]+"${finetune_overrides[@]}"})
}

# unlearn_command MODEL OBJECTIVE [NAME]: the result goes to the folder NAME, else to one called as the objective.
unlearn_command() {
  MODULE=grun
  COMMAND=(unlearn "profile=$PROFILE" "model.path=$1" "objective=$2")
  if [ -n "${DATA_DIR:-}" ]; then COMMAND+=("data.path=$DATA_DIR"); fi
  COMMAND+=("output_dir=$RESULTS/${3:-$2}" ${unlearn_overrides[@]+"${unlearn_overrides[@]}"})
}

# evaluate_command MODEL NAME [ADAPTER]; where REFERENCE is set, the evaluation that forget quality compares with.
evaluate_command() {
  MODULE=grun
  COMMAND=(evaluate "profile=$PROFILE" "model.path=$1")
  if [ -n "${3:-}" ]; then COMMAND+=("adapter=$3"); fi
  if [ -n "${REFERENCE:-}" ]; then COMMAND+=("reference=$REFERENCE"); fi
  if [ -n "${DATA_DIR:-}" ]; then COMMAND+=("data.path=$DATA_DIR"); fi
  COMMAND+=("output_dir=$RESULTS/evaluation/$2" ${evaluate_overrides[@]+"${evaluate_overrides[@]}"})
}

# evaluate_adapters_command MODEL SUFFIX ADAPTER ...: the model alone (`before`) and all of them in one command, which
# shares what they have in common; results go to evaluation/NAMESUFFIX, NAME that of the adapter's folder.
evaluate_adapters_command() {
  local adapter list=
  MODULE=grun
  COMMAND=(evaluate "profile=$PROFILE" "model.path=$1")
  for adapter in "${@:3}"; do list="$list,$(in_list "$adapter")"; done
  COMMAND+=("adapters=[${list#,}]" "with_base=before")
  if [ -n "$2" ]; then COMMAND+=("suffix=$2"); fi
  if [ -n "${REFERENCE:-}" ]; then COMMAND+=("reference=$REFERENCE"); fi
  if [ -n "${DATA_DIR:-}" ]; then COMMAND+=("data.path=$DATA_DIR"); fi
  COMMAND+=("output_dir=$RESULTS/evaluation" ${evaluate_overrides[@]+"${evaluate_overrides[@]}"})
}

# A text as an item of a list in brackets.
in_list() {
  case "$1" in
    *[!A-Za-z0-9_./+-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/''/g")" ;;
    *) printf '%s' "$1" ;;
  esac
}

# serve_command MODEL ADAPTER
serve_command() {
  MODULE=grun
  COMMAND=(serve "profile=$PROFILE" "model.path=$1" "adapter=$2" ${serve_overrides[@]+"${serve_overrides[@]}"})
}

report_command() {
  MODULE=grun
  COMMAND=(report "profile=$PROFILE" "results_dir=$RESULTS" ${report_overrides[@]+"${report_overrides[@]}"})
}

# sweep_command MODEL RETAIN_MODEL: options of unlearn and evaluate go along as lists.
sweep_command() {
  MODULE=grun
  COMMAND=(sweep "sweep=$SWEEP" "profile=$PROFILE" "model=$1")
  if [ -n "$2" ]; then COMMAND+=("retain_model=$2"); fi
  COMMAND+=("results_dir=$RESULTS" "jobs=$JOBS")
  COMMAND+=("objectives=$(as_list $OBJECTIVES)" "parametrizations=$(as_list $PARAMETRIZATIONS)" "seeds=$(as_list $SEEDS)")
  if [ -n "${DATA_DIR:-}" ]; then unlearn_options=("data.path=$DATA_DIR"); else unlearn_options=(); fi
  unlearn_options+=(${unlearn_overrides[@]+"${unlearn_overrides[@]}"})
  if [ ${#unlearn_options[@]} -gt 0 ]; then COMMAND+=("unlearn=$(as_list "${unlearn_options[@]}")"); fi
  if [ ${#evaluate_overrides[@]} -gt 0 ]; then COMMAND+=("evaluate=$(as_list "${evaluate_overrides[@]}")"); fi
  if [ -n "${LAUNCHER:-}" ]; then COMMAND+=("launcher=$LAUNCHER"); fi
  if [ "${TUNE:-0}" != 0 ]; then COMMAND+=(--tune); fi
  COMMAND+=(${sweep_overrides[@]+"${sweep_overrides[@]}"})
}

# Its arguments as a list in brackets.
as_list() {
  local word list=
  for word in "$@"; do list="$list,$(in_list "$word")"; done
  printf '[%s]' "${list#,}"
}

# started COMMAND...: runs it and returns its status; a signal that ends this script ends it first, and so does SIGKILL
# (grun/runtime/stopping.py reads GRUN_PARENT). In the background, since bash would sit a signal out.
started() {
  local status=0
  GRUN_PARENT=$$ "$@" &
  local child=$!
  trap 'kill -TERM "$child" 2>/dev/null || :' TERM INT HUP
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break  # else a signal has ended the wait
  done
  trap - TERM INT HUP
  return "$status"
}

# Resolves COMMAND's options without running it; leaves the script where they are wrong.
check_command() {
  local status=0
  if [ -z "$PYTHON" ]; then return 0; fi
  "$PYTHON" -m "$MODULE" "${COMMAND[@]}" --print-config >/dev/null || status=$?
  if [ "$status" -ne 0 ]; then
    say "nothing was run"
    exit "$status"
  fi
}

# One word as a shell reads it back.
quoted() {
  case "$1" in
    '' | *[!A-Za-z0-9_./=:,@%+-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
  esac
}

print_command() {
  local word line
  line=$(quoted "${PYTHON:-python}")
  for word in -m "$MODULE" "${COMMAND[@]}"; do line="$line $(quoted "$word")"; done
  printf '%s\n' "$line"
}

# run_stage TITLE: runs COMMAND; under DRY_RUN prints it. Only the table of report or sweep, and the address that serve
# prints, is a script's standard output.
run_stage() {
  if dry_run; then
    print_command
    return 0
  fi
  say "== $1 (after $SECONDS s)"
  case "${COMMAND[0]}" in
    report | sweep | serve) started "$PYTHON" -m "$MODULE" "${COMMAND[@]}" ;;
    *) started "$PYTHON" -m "$MODULE" "${COMMAND[@]}" >&2 ;;
  esac
}

# run_for_folder TITLE: as run_stage, and sets FOLDER to the last line that the command prints, the folder of its result.
run_for_folder() {
  if dry_run; then
    print_command
    return 0
  fi
  say "== $1 (after $SECONDS s)"
  local output status=0
  output=$(mktemp)
  started "$PYTHON" -m "$MODULE" "${COMMAND[@]}" >"$output" || status=$?
  FOLDER=$(tail -n 1 "$output")
  rm -f "$output"
  if [ "$status" -ne 0 ]; then return "$status"; fi
  if [ ! -d "$FOLDER" ]; then
    say "error: the command ended without naming the folder of its result (its last line: '$FOLDER')"
    exit 1
  fi
}

# teach SUBSET [BASE_MODEL]: sets TAUGHT to the folder of the taught model, which `finetune` prints last.
teach() {
  finetune_command "$@"
  if dry_run; then
    print_command
    if [ "$1" = all ]; then TAUGHT='models/<taught>'; else TAUGHT="models/<taught $1>"; fi
  else
    run_for_folder "finetune: $1"
    TAUGHT=$FOLDER
  fi
}

# model_of_profile PROFILE: a model that needs no teaching, of the profiles that have one: SmolLM2 is asked what it knows,
# others were published as taught.
model_of_profile() {
  case "$1" in
    smollm2) echo smollm2 ;;
    tofu_llama3.2_1b) echo open-unlearning/tofu_Llama-3.2-1B-Instruct_full ;;
  esac
}

# Whether the retain-only reference is to be taught: by default only in the demo, elsewhere it doubles the cost.
wants_retain_only() {
  case "${RETAIN_ONLY:-}" in
    '') [ "$PROFILE" = demo ] ;;
    0) return 1 ;;
    1) return 0 ;;
    *) refuse "RETAIN_ONLY=$RETAIN_ONLY; expected 0 or 1" ;;
  esac
}

# Sets reference: given (RETAIN_MODEL), taught (it will be) or none, which is said.
choose_reference() {
  local hint="RETAIN_ONLY=1 teaches one"
  reference=none
  if [ -n "$RETAIN_MODEL" ]; then
    reference=given
  elif [ -n "$MODEL" ]; then
    hint="RETAIN_MODEL names one"
  elif wants_retain_only; then
    reference=taught
  fi
  if [ "$reference" = none ] && [ "$MODEL" != smollm2 ]; then say "no retain-only model to compare with ($hint)"; fi
}

# Teaches what `choose_reference` and MODEL leave to be taught: sets MODEL and RETAIN_MODEL.
teach_models() {
  if [ -z "$MODEL" ]; then
    teach all
    MODEL=$TAUGHT
  fi
  if [ "$reference" = taught ]; then
    teach without_forget
    RETAIN_MODEL=$TAUGHT
  fi
}
