#!/usr/bin/env bash
# Fine-tuning on 1 % of ImageNet's labels, from SwAV, ResNet-50, 800 epochs: top-1 53.9, top-5 78.5 (from memory, unverified; not
# measured here). 8 GPUs of 32 images, global batch 256, 20 epochs; which cards and how many hours is not published.
#
#     MODEL=swav_800ep_pretrain.pth.tar LIST=1percent.txt DIR=/data/imagenet EXP=runs/1percent \
#         recipes/eval_semisup_1percent.sh [flags of eval_semisup.py]
#
# DIR has train/ and val/. LIST: the images, imagenet_subsets/1percent.txt of google-research/simclr; without it as many are
# drawn, the same number of every class.
set -euo pipefail

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
recipe eval_semisup.py \
    --labels_perc 1 ${LIST:+--list "$LIST"} --batch 256 --lr 0.02 --lr_last_layer 5 \
    --decay_epochs 12 16 --gamma 0.2 --wd 0 --epochs 20 \
    "$@"
