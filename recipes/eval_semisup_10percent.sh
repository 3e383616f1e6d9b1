#!/usr/bin/env bash
# Fine-tuning on 10 % of ImageNet's labels, from SwAV, ResNet-50, 800 epochs: top-1 70.2, top-5 89.9 (from memory, unverified; not
# measured here). 8 GPUs of 32 images, global batch 256, 20 epochs; which cards and how many hours is not published.
#
#     MODEL=swav_800ep_pretrain.pth.tar LIST=10percent.txt DIR=/data/imagenet EXP=runs/10percent \
#         recipes/eval_semisup_10percent.sh [flags of eval_semisup.py]
#
# DIR has train/ and val/. LIST: the images, imagenet_subsets/10percent.txt of google-research/simclr; without it as many are
# drawn, the same number of every class.
set -euo pipefail

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
recipe eval_semisup.py \
    --labels_perc 10 ${LIST:+--list "$LIST"} --batch 256 --lr 0.01 --lr_last_layer 0.2 \
    --decay_epochs 12 16 --gamma 0.2 --wd 0 --epochs 20 \
    "$@"
