#!/usr/bin/env bash
# The images of a folder that activate each filter of a convolution most.
#
#   DATA=/data/imagenet/val MODEL=../exp/checkpoint.pth.tar CONV=5 EXP=../exp/top ./activ-retrieval.sh [flags]
#
# Settings are variables; flags of activ_retrieval.py that follow are passed on and win over them.
# PYTHON=... names an interpreter to use instead of making .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ ${1:-} =~ ^(-h|--help)$ || -z ${DATA:-} ]]; then
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$root/visu/activ-retrieval.sh"
    [[ ${1:-} =~ ^(-h|--help)$ ]] && exit
    echo "activ-retrieval.sh: DATA is missing (a folder of images)" >&2
    exit 2
fi
MODEL=${MODEL:-$root/exp/checkpoint.pth.tar}
EXP=${EXP:-$root/exp}
CONV=${CONV:-1}
LAYER=${LAYER:-} # instead of CONV: any map, such as layer3 of a ResNet
WORKERS=${WORKERS:-4}

map=(--conv "$CONV")
[[ -n $LAYER ]] && map=(--layer "$LAYER")
# shellcheck source=../env.sh
. "$root/env.sh" requirements.txt
run "$PY" "$root/visu/activ_retrieval.py" --model "$MODEL" --exp "$EXP" "${map[@]}" --data "$DATA" \
    --workers "$WORKERS" "$@"
