#!/usr/bin/env bash
# Every task x scheme x algorithm x seed, JOBS runs at a time, spread over the GPUs. Finished runs
# are skipped and stopped ones go on, so the same command goes on after a stop. A failed run stops
# no other: it is named at the end, with exit code 1. Results are in ./runs, wherever you are.
#
#   bash run_all.sh                                       # the paper's Table 2
#   TASKS=pen-human-v1 SCHEMES="offline oap" ALGOS="td3bc iql" SEEDS="0 1" bash run_all.sh
#   GPUS="0 1" JOBS=6 bash run_all.sh --eval-every 10000  # 3 on each; arguments go to every run
#   DRY_RUN=1 bash run_all.sh                             # prints the commands
#   sbatch --array=0-39 --gpus=1 run_all.sh               # every array task takes its share
here=$(dirname "$0")
[ -f "$here/oap.py" ] || here=${SLURM_SUBMIT_DIR:-$here}  # sbatch starts a copy of this script
[ -f "$here/oap.py" ] || { echo "run_all.sh: no oap.py in $here" >&2; exit 2; }
gym=$(echo {halfcheetah,hopper,walker2d}-{random,medium,medium-replay,medium-expert}-v2)
antmaze=$(echo antmaze-umaze{,-diverse}-v0 antmaze-{medium,large}-{play,diverse}-v0)
all=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -x '[0-9]*' | xargs)
GPUS=${GPUS:-${CUDA_VISIBLE_DEVICES-$all}} && export GPUS=${GPUS//,/ }
jobs=${JOBS:-$(wc -w <<< "$GPUS")} && [ -z "$DRY_RUN" ] && [ "$jobs" -gt 1 ] || jobs=1
[ "$jobs" = 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
share=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / ${SLURM_ARRAY_TASK_STEP:-1}))
shares=${SLURM_ARRAY_TASK_COUNT:-1} notes=$(mktemp -d) && export notes || exit 2
trap 'rm -rf "$notes"' EXIT
[ $share -lt "$shares" ] || { echo "run_all.sh: --array must be a range" >&2; exit 2; }
one_run() {  # in slot SLOT of all jobs: oap.py with the run's eight arguments, then the user's
  set -- "$1" "${@: -8}" "${@:2:$#-9}"
  read -ra gpus <<< "$GPUS"
  [ -z "$GPUS" ] || export CUDA_VISIBLE_DEVICES="${gpus[SLOT % ${#gpus[@]}]}"
  [ -z "$DRY_RUN" ] || { printf '%q ' python "$@" && echo && return; }
  { python "$@" 2>&1 >&3 | tee "$notes/$SLOT" >&2; } 3>&1 && return  # the status is python's
  grep -q "another process trains in" "$notes/$SLOT" && what="another process has" || what=failed
  echo "$what: ${*:2:8}" >> "$notes/report"
}
export -f one_run && set -m  # what follows is a job, which is stopped as a whole
trap 'kill %1; disown; echo "run_all.sh: stopped; the same command goes on"; exit 130' INT TERM HUP
for task in ${TASKS:-$gym $antmaze pen-human-v1 pen-cloned-v1}; do for algo in ${ALGOS:-td3bc}; do
  for scheme in ${SCHEMES:-offline online online-mix o2o oap}; do for s in ${SEEDS:-0 1 2 3 4}; do
    echo "--env $task --algo $algo --scheme $scheme --seed $s"; done; done; done; done |
  awk "(NR - 1) % $shares == $share" | xargs -rn 8 -P "$jobs" --process-slot-var=SLOT \
    bash -o pipefail -c 'one_run "$@"' - "$here/oap.py" "$@" &
wait $! && { cat "$notes/report" 2>/dev/null; ! grep -qs ^failed "$notes/report"; }
