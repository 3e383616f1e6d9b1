#!/usr/bin/env bash
# Supervised VGG-16 on ImageNet that starts from DeeperCluster's: top-1 74.9, 0.8 above the same from scratch (published, abstract
# of arXiv 1905.01278v3; top-5 92.3 against 91.8: from memory, unverified; not measured here). 4 GPUs of 64 images, global batch
# 256, 100 epochs; which cards and how many hours is not published. Theirs had batch norm over each GPU's part, here it is over all.
#
#     MODEL=ours.pth DIR=/data/imagenet EXP=runs/pretrain recipes/eval_pretrain_deepercluster.sh [flags of eval_pretrain.py]
#
# DIR has train/ and val/. From scratch: MODEL=random:vgg16wide:sobel.
set -euo pipefail

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
recipe eval_pretrain.py \
    --sobel2RGB true --batch 256 --lr 0.1 --decay_epochs 30 60 90 --gamma 0.1 --wd 0.0001 --epochs 100 \
    "$@"
