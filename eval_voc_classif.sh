#!/usr/bin/env bash
# Classification on Pascal VOC 2007: fc6-8 trained on trainval, tested on test, in PyTorch.
#
#   VOC=/data/VOCdevkit/VOC2007 MODEL=exp/checkpoint.pth.tar ./eval_voc_classif.sh [flags of eval_voc_classif.py]
#   ./eval_voc_classif.sh VOC MODEL [flags]          the same
#
# Settings are variables with these defaults: SPLIT=trainval FC6_8=1 TRAIN_BATCHNORM=1 EVAL_RANDOM_CROPS=1
# NIT=80000 STEPSIZE=5000 LR=0.003 BATCH=16 EXP=exp WORKERS=12 (or the number of cores). A flag wins over them.
# TRAIN_BATCHNORM=1 is the setting of the paper's figure, TRAIN_BATCHNORM=0 the one of its erratum
# (docs/results.md). Add --resume auto to go on where it was stopped.
# eval_voc_classif_fc6_8.sh and eval_voc_classif_all.sh run this with other defaults.
# PYTHON=... names an interpreter to use instead of making .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

if [[ ${1:-} =~ ^(-h|--help)$ ]]; then
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$root/eval_voc_classif.sh"
    exit
fi
VOC=${VOC:-}
MODEL=${MODEL:-}
if [[ $# -gt 0 && $1 != -* ]]; then
    VOC=$1
    shift
fi
if [[ $# -gt 0 && $1 != -* ]]; then
    MODEL=$1
    shift
fi
WORKERS=${WORKERS:-$((cores < 12 ? cores : 12))}

if [[ ! -d $VOC ]]; then
    echo "eval_voc_classif.sh: VOC=$VOC: no such folder; set VOC to the folder VOC2007 (ImageSets, JPEGImages)" >&2
    exit 2
fi
if [[ ! -f $MODEL ]]; then
    echo "eval_voc_classif.sh: MODEL=$MODEL: no such file; set MODEL to a checkpoint" >&2
    exit 2
fi
# shellcheck source=env.sh
. "$root/env.sh" requirements.txt
run "$PY" "$root/eval_voc_classif.py" --vocdir "$VOC" --model "$MODEL" --split "${SPLIT:-trainval}" \
    --fc6_8 "${FC6_8:-1}" --train_batchnorm "${TRAIN_BATCHNORM:-1}" \
    --eval_random_crops "${EVAL_RANDOM_CROPS:-1}" --nit "${NIT:-80000}" --stepsize "${STEPSIZE:-5000}" \
    --lr "${LR:-0.003}" --batch "${BATCH:-16}" --exp "${EXP:-exp}" --workers "$WORKERS" "$@"
