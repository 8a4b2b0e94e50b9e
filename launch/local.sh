#!/usr/bin/env bash
# One machine, any number of GPUs: one process drives all of them.
#
#   GPUS=0,1,2,3 launch/local.sh train --config=configs/npz.py --workdir=runs/mine --config.data.path=FILE.npz ...
#
# Without GPUS every GPU of the machine is used. Clusters are spread over the devices; nothing has to be set.
set -euo pipefail
: "${1:?usage: [GPUS=0,1] launch/local.sh COMMAND --flags (see: lmeraser --help)}"
if [ -n "${GPUS:-}" ]; then
  export CUDA_VISIBLE_DEVICES="$GPUS"
fi
exec lmeraser "$@"
