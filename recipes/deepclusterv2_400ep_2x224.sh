#!/usr/bin/env bash
# DeepCluster-v2, ResNet-50, 400ep, 2x224: ImageNet linear top-1 70.2 (published, not measured here).
# 64 GPUs of 64 images, global batch 4096; SLURM limit 25 h.
# Figures: the authors' README (facebookresearch/swav); which cards is not said there.
#
#     DIR=/data/imagenet/train EXP=runs/v2 recipes/deepclusterv2_400ep_2x224.sh [flags of main_deepclusterv2.py]
set -euo pipefail

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
recipe main_deepclusterv2.py \
    --arch resnet50 --nmb_prototypes 3000 3000 3000 --freeze_prototypes_niters 300000 \
    --nmb_crops 2 --size_crops 224 \
    --min_scale_crops 0.08 --max_scale_crops 1 \
    --batch_size 64 --base_lr 4.8 --final_lr 0.0048 --warmup_epochs 10 --start_warmup 0.3 \
    --epochs 400 \
    "$@"
