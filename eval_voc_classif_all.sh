#!/usr/bin/env bash
# Classification on Pascal VOC 2007 with fine-tuning: all layers trained, 150,000 iterations.
#
#   VOC=/data/VOCdevkit/VOC2007 MODEL=exp/checkpoint.pth.tar ./eval_voc_classif_all.sh [flags]
#
# eval_voc_classif.sh says what can be set; this script only has other defaults.
set -euo pipefail

export FC6_8=${FC6_8:-0} LR=${LR:-0.001} STEPSIZE=${STEPSIZE:-20000} NIT=${NIT:-150000} BATCH=${BATCH:-16}
exec "$(dirname "${BASH_SOURCE[0]}")/eval_voc_classif.sh" "$@"
