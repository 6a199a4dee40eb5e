#!/usr/bin/env bash
# Every task x scheme x algorithm, all seeds together: one queue for each GPU, or one on the CPU.
#
#   SCHEMES=expert SEEDS=0 TASKS="halfcheetah-medium-v2 walker2d-medium-v2" bash run_all.sh  # black boxes
#   bash run_all.sh                                    # the runs of the paper's Table 2
#   TASKS=pen-human-v1 SCHEMES="offline oap" ALGOS="td3bc iql" SEEDS="0 1" bash run_all.sh
#   DRY_RUN=1 bash run_all.sh                          # prints the commands
#   GPUS="0 1" bash run_all.sh                         # these GPUs; all of them by default
#   sbatch --array=0-39 --gpus=1 run_all.sh            # every task of the array takes its share
#   TASKS=hopper-medium-v2 bash run_all.sh --expert hopper.pt   # arguments go to every run
#
# A finished run is skipped, so the same command goes on after a stop. A failed run does not stop the
# others: it is listed at the end, with exit code 1.
set -u
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")}" || exit 1
gym=$(echo {halfcheetah,hopper,walker2d}-{random,medium,medium-replay,medium-expert}-v2)
antmaze=$(echo antmaze-umaze{,-diverse}-v0 antmaze-{medium,large}-{play,diverse}-v0)
read -ra tasks <<< "${TASKS:-$gym $antmaze pen-human-v1 pen-cloned-v1}"
read -ra schemes <<< "${SCHEMES:-offline online online-mix o2o oap}"
read -ra algos <<< "${ALGOS:-td3bc}"
all_gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | tr '\n' ' ')
gpus=${GPUS:-${CUDA_VISIBLE_DEVICES:-$all_gpus}}
read -ra gpus <<< "${gpus//,/ }"
[ ${#gpus[@]} -gt 0 ] || gpus=(none)

runs=()
for task in "${tasks[@]}"; do for scheme in "${schemes[@]}"; do for algo in "${algos[@]}"; do
  [ "$scheme" = expert ] && learner="" || learner=" --algo $algo"  # black boxes are SAC's
  runs+=("--env $task --scheme $scheme$learner --seeds ${SEEDS:-0 1 2 3 4}")
done; done; done
shares=${SLURM_ARRAY_TASK_COUNT:-1}
share=$(((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) / ${SLURM_ARRAY_TASK_STEP:-1}))
[ "$share" -lt "$shares" ] || { echo "not one of $shares array tasks: $share"; exit 2; }

failed=$(mktemp) && trap 'rm -f "$failed"' EXIT
stopped="" children=()
stop() {  # passes a signal on: each run saves its checkpoint before it leaves
  stopped=1
  kill "${children[@]}" 2>/dev/null
  sleep 0.3  # a child that was just being forked may not have heard it
  kill "${children[@]}" 2>/dev/null
}
trap stop INT TERM
await() {  # a background process; a signal ends bash's own wait too early
  while kill -0 "$1" 2>/dev/null; do wait "$1"; done
}
begin() {  # a command, in the background, also if a signal comes right now
  "$@" &
  children+=($!)
  [ -z "$stopped" ] || stop
}
queue() {  # GPU, its place among the GPUs, arguments for every run
  local gpu=$1 place=$2 i=-1 run status
  trap stop INT TERM
  [ "$gpu" = none ] || export CUDA_VISIBLE_DEVICES=$gpu
  for run in "${runs[@]}"; do
    i=$((i + 1)) children=()
    [ $((i % shares)) -eq "$share" ] && [ $((i / shares % ${#gpus[@]})) -eq "$place" ] || continue
    # shellcheck disable=SC2086  # a run is several words
    if [ -n "${DRY_RUN:-}" ]; then
      echo "python oap.py $run ${*:3}"
      continue
    fi
    # shellcheck disable=SC2086
    begin python oap.py $run "${@:3}"
    await $!
    wait $!
    status=$?
    [ -z "$stopped" ] || return
    [ $status -eq 0 ] || echo "$run" >> "$failed"
  done
}
for place in "${!gpus[@]}"; do
  begin queue "${gpus[place]}" "$place" "$@"
done
for queue in "${children[@]}"; do await "$queue"; done
[ -z "$stopped" ] || echo "stopped: the same command goes on"
[ ! -s "$failed" ] || { echo "failed runs:" && cat "$failed"; }
[ -z "$stopped" ] && [ ! -s "$failed" ]
