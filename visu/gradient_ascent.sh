#!/usr/bin/env bash
# Pictures that activate each filter of a convolution, by gradient ascent.
#
#   MODEL=../exp/checkpoint.pth.tar CONV=5 EXP=../exp/ascent ./gradient_ascent.sh [flags of gradient_ascent.py]
#
# Settings are variables; flags that follow are passed on and win over them. Without flags the ascent is chosen for
# the layer (--preset). PYTHON=... names an interpreter to use instead of making .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ ${1:-} =~ ^(-h|--help)$ ]]; then
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$root/visu/gradient_ascent.sh"
    exit
fi
MODEL=${MODEL:-$root/exp/checkpoint.pth.tar}
ARCH=${ARCH:-} # empty: what the checkpoint says
EXP=${EXP:-$root/exp}
CONV=${CONV:-1}
LAYER=${LAYER:-} # instead of CONV: any map, such as layer3 of a ResNet

map=(--conv "$CONV")
[[ -n $LAYER ]] && map=(--layer "$LAYER")
# shellcheck source=../env.sh
. "$root/env.sh" requirements.txt
run "$PY" "$root/visu/gradient_ascent.py" --model "$MODEL" ${ARCH:+--arch "$ARCH"} --exp "$EXP" "${map[@]}" "$@"
