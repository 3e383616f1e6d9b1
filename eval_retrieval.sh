#!/usr/bin/env bash
# Instance retrieval on Oxford5k or Paris6k: R-MAC descriptors, mean average precision.
#
#   DATASETS=/data MODEL=exp/checkpoint.pth.tar EVAL=Oxford EXP=exp/retrieval ./eval_retrieval.sh [flags]
#
# DATASETS  folder with Oxford/ and Paris/, in each lab/ (ground truth) and jpg/ (images); both are needed, the
#           PCA is learnt on the one that is not scored
# MODEL     checkpoint to evaluate, or pretrained for torchvision's supervised VGG-16
# EVAL      Oxford or Paris (default: Oxford)
# EXP       where results.json and the descriptors go (default: exp); TEMP=... puts the descriptors elsewhere
# GND       gnd_roxford5k.pkl or gnd_rparis6k.pkl: the revisited protocol too (default: not)
#
# The paper's settings are given: S=1024, L=3. STAGE=extract_train (train_pca, db_features, q_features, eval)
# does one stage only. Flags of eval_retrieval.py (--multires, --aqe K, --dbe K, ...) win over the variables.
# PYTHON=... names an interpreter to use instead of making .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

DATASETS=${DATASETS:-}
MODEL=${MODEL:-}
EXP=${EXP:-exp}
WORKERS=${WORKERS:-$((cores < 12 ? cores : 12))} # 12 as the authors, or what there is

if [[ ${1:-} =~ ^(-h|--help)$ ]]; then
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$root/eval_retrieval.sh"
    exit
fi
# Before anything is set up. A flag may give what the variable leaves out.
if [[ -z $DATASETS && ! " $* " =~ \ --(datasets|oxford|paris) ]]; then
    echo "eval_retrieval.sh: set DATASETS to a folder with Oxford/ and Paris/, e.g. DATASETS=/data" >&2
    exit 2
fi
if [[ -z $MODEL && " $* " != *" --model"* ]]; then
    echo "eval_retrieval.sh: set MODEL to a checkpoint, e.g. MODEL=exp/checkpoint.pth.tar, or to pretrained" >&2
    exit 2
fi
# shellcheck source=env.sh
. "$root/env.sh" requirements.txt
run "$PY" "$root/eval_retrieval.py" ${DATASETS:+--datasets "$DATASETS"} ${MODEL:+--model "$MODEL"} --exp "$EXP" \
    --eval "${EVAL:-Oxford}" --stage "${STAGE:-all}" --S "${S:-1024}" --L "${L:-3}" --workers "$WORKERS" \
    ${TEMP:+--temp "$TEMP"} ${GND:+--gnd "$GND"} "$@"
