#!/usr/bin/env bash
# Classification on Pascal VOC 2007 without fine-tuning: fc6-8 trained, 150,000 iterations.
#
#   VOC=/data/VOCdevkit/VOC2007 MODEL=exp/checkpoint.pth.tar ./eval_voc_classif_fc6_8.sh [flags]
#
# eval_voc_classif.sh says what can be set; this script only has other defaults.
set -euo pipefail

export FC6_8=${FC6_8:-1} LR=${LR:-0.003} STEPSIZE=${STEPSIZE:-5000} NIT=${NIT:-150000} BATCH=${BATCH:-16}
exec "$(dirname "${BASH_SOURCE[0]}")/eval_voc_classif.sh" "$@"
