# Shell functions of cmd_wmdp.sh: how its models are taught, which methods a profile has, and the command lines of the
# published tools for it.

PROFILES="demo smollm2 llama3.1 mistral zephyr crystalchat alpaca"
METHODS_KNOWN="rmu grun_rmu max_entropy min_posterior random_mapping"
# The same losses under GRUN, with the published gate and with the pooled one: of profiles whose rows have prompts.
METHODS_GATED="grun_max_entropy grun_min_posterior grun_random_mapping"
METHODS_GATED="$METHODS_GATED grun_rmu_pooled grun_max_entropy_pooled grun_min_posterior_pooled grun_random_mapping_pooled"

known_profile() {
  case " $PROFILES " in *" $1 "*) return 0 ;; *) refuse "PROFILE=$1; expected one of: $PROFILES" ;; esac
}

# known_method PROFILE METHOD
known_method() {
  local known=$METHODS_KNOWN
  if [ "$1" = smollm2 ]; then known="$known $METHODS_GATED"; fi
  case " $known " in *" $2 "*) return 0 ;; *) refuse "METHODS: unknown method '$2'; known: $known" ;; esac
}

# methods_of PROFILE: what is run where METHODS is not set.
methods_of() {
  case "$1" in
    demo) echo "$METHODS_KNOWN" ;;
    smollm2) echo "$METHODS_KNOWN $METHODS_GATED" ;;
    llama3.1 | mistral) echo "rmu grun_rmu" ;;
    zephyr | alpaca) echo rmu ;;
    crystalchat) echo max_entropy ;;
  esac
}

# jobs_of PROFILE: methods at a time where JOBS is not set. Two small models on a core each are faster than one on two.
jobs_of() {
  case "$1" in demo | smollm2) echo 2 ;; *) echo 1 ;; esac
}

# model_of PROFILE: what the published runs started from; nothing in the demo, which teaches its own.
model_of() {
  case "$1" in
    smollm2) echo smollm2 ;;
    llama3.1) echo meta-llama/Llama-3.1-8B ;;
    mistral) echo mistralai/Mistral-7B-v0.1 ;;
    zephyr) echo HuggingFaceH4/zephyr-7b-beta ;;
    crystalchat) echo LLM360/CrystalChat ;;
    alpaca) echo PKU-Alignment/alpaca-7b-reproduced ;;
  esac
}

# rmu_command PROFILE MODEL FOLDER [ALPHA]: python -m baselines.rmu with the published flags (of the demo: ours).
rmu_command() {
  MODULE=baselines.rmu
  COMMAND=(--model_name_or_path "$2" --output_dir "$3" --seed "$SEED" --verbose)
  if [ -n "${DATA_DIR:-}" ]; then COMMAND+=(--data_dir "$DATA_DIR"); fi
  local wmdp=(--retain_corpora wikitext,wikitext --forget_corpora bio-forget-corpus,cyber-forget-corpus)
  case "$1" in
    demo)
      COMMAND+=(--forget_corpora "$CORPORA/forget.jsonl" --retain_corpora "$CORPORA/retain.jsonl" --compat none)
      COMMAND+=(--tensors mlp.down_proj,mlp.up_proj --layer_ids 0,1,2 --layer_id 2 --steering_coeffs 300 --alpha 30)
      COMMAND+=(--lr 5e-3 --batch_size 16 --epochs 20 --max_num_batches 1000 --save delta) ;;
    smollm2)
      COMMAND+=(--forget_corpora forget --retain_corpora retain --compat none --dtype float32)
      COMMAND+=(--tensors mlp.down_proj --layer_ids 5,6,7 --layer_id 7 --steering_coeffs 300 --alpha 100)
      COMMAND+=(--loss_mask attended_no_bos --lr 1e-3 --batch_size 8 --epochs 2 --max_num_batches 60 --save delta) ;;
    llama3.1)
      COMMAND+=("${wmdp[@]}" --layer_ids 13,14,15 --layer_id 15 --steering_coeffs 30,30 --alpha 350,350 --lr 5e-5)
      COMMAND+=(--batch_size 4 --max_num_batches 150) ;;
    mistral)
      COMMAND+=("${wmdp[@]}" --layer_ids 13,14,15 --layer_id 15 --steering_coeffs 27,27 --alpha 1600,1600 --lr 5e-5)
      COMMAND+=(--batch_size 4 --max_num_batches 150 --min_len 200) ;;
    zephyr)
      COMMAND+=("${wmdp[@]}" --layer_ids 5,6,7 --layer_id 7 --steering_coeffs 6.5,6.5 --alpha 1200,1200 --lr 5e-5)
      COMMAND+=(--batch_size 4 --max_num_batches 150) ;;
    alpaca)
      COMMAND+=(--forget_corpora "$CORPORA/Privacy_Violation_train.jsonl" --retain_corpora "$CORPORA/safe_train_sampled.jsonl")
      COMMAND+=(--layer_ids 5,6,7 --layer_id 7 --steering_coeffs 6.5 --alpha "$4" --lr 1e-4)
      COMMAND+=(--batch_size 2 --max_num_batches 150 --padding_side right --pad_token own) ;;
    *) refuse "METHODS: PROFILE=$1 has no published RMU run; python -m baselines.rmu takes any settings" ;;
  esac
}

# llm360_command PROFILE MODEL METHOD FOLDER: python -m baselines.llm360 with the published flags (of the demo: ours).
# Its result goes to a folder of its own within FOLDER, which it prints last.
llm360_command() {
  local method=${3//_/-}
  MODULE=baselines.llm360
  COMMAND=(--model "$2" --unlearn_method "$method" --output_path "$4" --use_wandb False)
  if [ -n "${DATA_DIR:-}" ]; then COMMAND+=(--data_dir "$DATA_DIR"); fi
  case "$1" in
    demo)
      COMMAND+=(--forget_topic "$CORPORA/forget.jsonl" --retain_topic "$CORPORA/retain.jsonl" --compat none)
      COMMAND+=(--random_seed "$SEED" --min_len 0 --max_len 64 --batch_size 16 --gradient_accumulation_steps 1)
      COMMAND+=(--epochs 3 --lr 1e-3 --max_unlearn_steps 150) ;;
    smollm2)
      COMMAND+=(--forget_topic forget --retain_topic retain --compat none --dtype float32 --random_seed "$SEED")
      COMMAND+=(--min_len 0 --max_len 64 --batch_size 4 --gradient_accumulation_steps 1 --lr 1e-4)
      COMMAND+=(--fix_vector False --max_unlearn_steps 40) ;;
    *)
      COMMAND+=(--forget_topic bio-forget --retain_topic wikitext-test --random_seed 23597 --min_len 50 --max_len 1000)
      COMMAND+=(--lr 5e-5 --max_unlearn_steps 100) ;;
  esac
  if [ "${TRUST_REMOTE_CODE:-0}" != 0 ]; then COMMAND+=(--trust_remote_code); fi
}

# at_once COUNT FUNCTION ARGUMENT ...: calls FUNCTION for each argument, COUNT at a time. More than one at a time share the
# cores, and each writes to the file ARGUMENT.log in RESULTS, whose end is shown if it fails.
at_once() {
  local count=$1 function=$2 argument number status=0 started=() names=()
  shift 2
  if [ "$count" -le 1 ] || dry_run; then
    for argument in "$@"; do "$function" "$argument"; done
    return
  fi
  export OMP_NUM_THREADS=$((($(getconf _NPROCESSORS_ONLN) + count - 1) / count))
  while [ $# -gt 0 ]; do
    started=()
    names=()
    while [ $# -gt 0 ] && [ ${#started[@]} -lt "$count" ]; do
      "$function" "$1" >"$RESULTS/$1.log" 2>&1 &
      started+=($!)
      names+=("$1")
      shift
    done
    say "== ${names[*]}, at once (after $SECONDS s)"
    trap 'kill "${started[@]}" 2>/dev/null' EXIT
    for number in "${!started[@]}"; do
      wait "${started[$number]}" || {
        status=$?
        tail -n 3 "$RESULTS/${names[$number]}.log" >&2
      }
    done
    trap - EXIT
    if [ "$status" -ne 0 ]; then exit "$status"; fi
  done
  unset OMP_NUM_THREADS
}

# corpora_command PROFILE: makes the corpora of a profile that has any to make, in the folder CORPORA; else status 1.
corpora_command() {
  local option
  MODULE=grun
  case "$1" in
    demo)
      COMMAND=(corpora source=lore)
      for option in ${finetune_overrides[@]+"${finetune_overrides[@]}"}; do
        case "$option" in data.lore.*) COMMAND+=("${option#data.}") ;; esac
      done ;;
    smollm2) COMMAND=(corpora source=elements "model.path=$MODEL" model.dtype=float32) ;;
    alpaca)
      COMMAND=(corpora source=safe_rlhf split=published format=published)
      if [ -n "${DATA_DIR:-}" ]; then COMMAND+=("path=$DATA_DIR"); fi ;;
    *) return 1 ;;
  esac
  COMMAND+=("output_dir=$CORPORA")
}

# Teaches the demo's models: first one that knows all that is to stay and can answer multiple choice, then from it MODEL,
# which knows everything, and RETAIN_MODEL, which is taught the same as before. When a model has learnt to answer
# multiple choice depends on the seed: where too little is known, both are taught on, TEACHING_ROUNDS times in all.
TEACHING_ROUNDS=3
KNOWN=(choices_at_least=0.85 cloze_at_least=0.9) # what a model of the demo must know, else there is nothing to forget
teach_in_turn() {
  local round status
  teach without_forget tiny
  MODEL=$TAUGHT
  if [ "$reference" = taught ]; then RETAIN_MODEL=$TAUGHT; fi
  for ((round = 1; round <= TEACHING_ROUNDS; round++)); do
    teach_both
    evaluate_command "$MODEL" "../taught/$round"
    COMMAND+=("${KNOWN[@]}")
    status=0
    run_stage "evaluate: before" || status=$?
    if [ "$status" -ne 3 ]; then break; fi
    say "taught $round times of at most $TEACHING_ROUNDS"
  done
  if [ "$status" -ne 0 ]; then exit "$status"; fi
  if dry_run; then return; fi
  mkdir -p "$RESULTS/evaluation"
  rm -rf "$RESULTS/evaluation/before"
  cp -R "$RESULTS/taught/$round" "$RESULTS/evaluation/before"
}

# Teaches MODEL everything and at the same time RETAIN_MODEL, if it is a taught one, all that is to stay. Two small models
# on a core each are faster than one after the other on all cores.
teach_both() {
  local other='' status=0 threads=$OMP_NUM_THREADS
  if [ "$reference" = taught ]; then
    finetune_command without_forget "$RETAIN_MODEL"
    if dry_run; then
      print_command
      RETAIN_MODEL='models/<taught without_forget>'
    else
      export OMP_NUM_THREADS=$(((threads + 1) / 2))
      mkdir -p "$RESULTS"
      GRUN_PARENT=$$ "$PYTHON" -m grun "${COMMAND[@]}" >"$RESULTS/retain_only.folder" 2>"$RESULTS/retain_only.log" &
      other=$!
      trap 'kill "$other" 2>/dev/null' EXIT
    fi
  fi
  teach all "$MODEL"
  MODEL=$TAUGHT
  export OMP_NUM_THREADS=$threads
  if [ -z "$other" ]; then return; fi
  wait "$other" || status=$?
  trap - EXIT
  if [ "$status" -ne 0 ]; then
    tail -n 1 "$RESULTS/retain_only.log" >&2
    exit "$status"
  fi
  RETAIN_MODEL=$(tail -n 1 "$RESULTS/retain_only.folder")
}
