#!/usr/bin/env bash
# One machine, any number of GPUs. Nothing has to be edited.
#
#   GPUS=0,1,2,3 launch/local.sh train --config=configs/npz.py --workdir=runs/mine --config.data.path=FILE.npz ...
#
# One process uses all GPUs, or those of GPUS, and spreads the clusters over them. With PROCESSES=n there are n
# processes instead; with GPUS, process i takes the i-th GPU. The bits are the same (docs/launch.md). Commands: train,
# add, unlearn, process, rollback.
set -euo pipefail
: "${1:?usage: [GPUS=0,1] [PROCESSES=2] launch/local.sh COMMAND --flags (see: lmeraser --help)}"
PROCESSES="${PROCESSES:-1}"
if ! [ "$PROCESSES" -ge 1 ] 2>/dev/null; then
  echo "PROCESSES=$PROCESSES must be a number of processes, at least 1" >&2
  exit 2
fi
if [ "$PROCESSES" -eq 1 ]; then
  if [ -n "${GPUS:-}" ]; then export CUDA_VISIBLE_DEVICES="$GPUS"; fi
  exec lmeraser "$@"
fi

case "$1" in
  train | add | unlearn | process | rollback) ;;
  *) echo "PROCESSES=$PROCESSES: $1 runs in one process; leave PROCESSES out" >&2 && exit 2 ;;
esac
IFS=, read -r -a gpus <<<"${GPUS:-}"
if [ -n "${GPUS:-}" ] && [ "${#gpus[@]}" -ne "$PROCESSES" ]; then
  echo "GPUS=$GPUS names ${#gpus[@]} GPUs for PROCESSES=$PROCESSES; name one for each process" >&2
  exit 2
fi
port="${PORT:-$((20000 + RANDOM % 10000))}"
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT # each ends after its wave, with exit code 0
for ((i = 0; i < PROCESSES; i++)); do
  if [ -n "${GPUS:-}" ]; then export CUDA_VISIBLE_DEVICES="${gpus[i]}"; fi
  lmeraser "$@" --coordinator_address="127.0.0.1:$port" --num_processes="$PROCESSES" --process_id="$i" &
  pids+=("$!")
done
highest=0
for pid in "${pids[@]}"; do
  code=0
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # a signal ends a wait early
  wait "$pid" || code=$?
  if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
