#!/usr/bin/env bash
# One machine, any number of GPUs. Nothing has to be edited.
#
#   GPUS=0,1,2,3 launch/local.sh train --config=configs/npz.py --workdir=runs/mine --config.data.path=FILE.npz ...
#
# Without GPUS every GPU of the machine is used, by one process, which spreads the clusters over them.
# With PROCESSES=n there are n processes instead; with GPUS, process i takes the i-th GPU. Each runs the program of one
# GPU, so the bits are those of a machine with one GPU (docs/launch.md).
set -euo pipefail
: "${1:?usage: [GPUS=0,1] [PROCESSES=2] launch/local.sh COMMAND --flags (see: lmeraser --help)}"
PROCESSES="${PROCESSES:-1}"
if ! [ "$PROCESSES" -ge 1 ] 2>/dev/null; then
  echo "PROCESSES=$PROCESSES must be a number of processes, at least 1" >&2
  exit 2
fi
if [ "$PROCESSES" -eq 1 ]; then
  if [ -n "${GPUS:-}" ]; then
    export CUDA_VISIBLE_DEVICES="$GPUS"
  fi
  exec lmeraser "$@"
fi

IFS=, read -r -a gpus <<<"${GPUS:-}"
if [ -n "${GPUS:-}" ] && [ "${#gpus[@]}" -ne "$PROCESSES" ]; then
  echo "GPUS=$GPUS names ${#gpus[@]} GPUs for PROCESSES=$PROCESSES; name one for each process" >&2
  exit 2
fi
port="${PORT:-$((20000 + RANDOM % 10000))}"
one() { # runs a process; says its number, then its exit code, for a wait that a signal ends can lose the code
  trap : TERM INT # passed on to the process below; Ctrl-C reaches all of them and must not end it at once
  bash -c 'trap "" INT; echo "$$"; exec lmeraser "$@" >&3 3>&- </dev/null' lmeraser "$@" && echo 0 || echo "$?"
}
pids=()
ends=()
stopped=
trap 'stopped=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
exec 3>&1
for ((i = 0; i < PROCESSES; i++)); do
  if [ -n "$stopped" ]; then break; fi
  if [ -n "${GPUS:-}" ]; then
    export CUDA_VISIBLE_DEVICES="${gpus[i]}"
  fi
  exec {end}< <(one "$@" --coordinator_address="127.0.0.1:$port" --num_processes="$PROCESSES" --process_id="$i")
  read -r pid <&"$end"
  pids+=("$pid")
  ends+=("$end")
done
highest=0
for end in "${ends[@]}"; do
  read -r code <&"$end" || code=1
  if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
