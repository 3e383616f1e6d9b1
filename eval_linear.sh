#!/usr/bin/env bash
# Train linear classifiers on the frozen convolutions of a network, and print their precision by layer.
#
#   DATA=/data/imagenet MODEL=exp/checkpoint.pth.tar CONV="1 2 3 4 5" EXP=exp/linear ./eval_linear.sh [flags]
#
# DATA   folder with train/ and val/, class sub-folders in both (ImageNet, Places)
# MODEL  checkpoint to evaluate, or random:alexnet:sobel for a network that has learnt nothing
# CONV   on top of which convolutional layers, one or several (default: 3)
# LAYERS instead of CONV: layers by name, e.g. "layer3 layer4 avgpool" of a ResNet
# EXP    where classifiers, logs and results.json go (default: exp)
#
# The authors' settings are given: LR=0.01, WD=-7, ten crops. Flags of eval_linear.py win over the variables.
# PYTHON=... names an interpreter to use instead of making .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

DATA=${DATA:-}
MODEL=${MODEL:-}
CONV=${CONV:-3}
LAYERS=${LAYERS:-}
EXP=${EXP:-exp}
LR=${LR:-0.01}
WD=${WD:--7}
WORKERS=${WORKERS:-$((cores < 12 ? cores : 12))} # 12 as the authors, or what there is
read -ra layers <<<"--conv $CONV"
if [[ -n $LAYERS ]]; then
    read -ra layers <<<"--layers $LAYERS"
fi

if [[ ${1:-} =~ ^(-h|--help)$ ]]; then
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$root/eval_linear.sh"
    exit
fi
# Before anything is set up. A flag may give what the variable leaves out.
if [[ -z $DATA && " $* " != *" --data"* ]]; then
    echo "eval_linear.sh: set DATA to a folder with train/ and val/, e.g. DATA=/data/imagenet" >&2
    exit 2
fi
if [[ -z $MODEL && " $* " != *" --model"* ]]; then
    echo "eval_linear.sh: set MODEL to a checkpoint, e.g. MODEL=exp/checkpoint.pth.tar" >&2
    exit 2
fi
# shellcheck source=env.sh
. "$root/env.sh" requirements.txt
run "$PY" "$root/eval_linear.py" --data "$DATA" --model "$MODEL" "${layers[@]}" --exp "$EXP" \
    --lr "$LR" --wd="$WD" --tencrops --verbose --workers "$WORKERS" "$@"
