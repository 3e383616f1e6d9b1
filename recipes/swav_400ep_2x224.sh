#!/usr/bin/env bash
# SwAV, ResNet-50, 400ep, 2x224: ImageNet linear top-1 70.1 (published, not measured here).
# 64 GPUs of 64 images, global batch 4096; SLURM limit 25 h.
# Figures: the authors' README (facebookresearch/swav); which cards is not said there.
#
#     DIR=/data/imagenet/train EXP=runs/swav recipes/swav_400ep_2x224.sh [flags of main_swav.py]
set -euo pipefail

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
recipe main_swav.py \
    --arch resnet50 --nmb_prototypes 3000 --epsilon 0.05 --sinkhorn_iterations 3 --use_fp16 true \
    --nmb_crops 2 --size_crops 224 \
    --min_scale_crops 0.08 --max_scale_crops 1 \
    --batch_size 64 --base_lr 4.8 --final_lr 0.0048 --warmup_epochs 10 --start_warmup 0.3 \
    --epochs 400 --freeze_prototypes_niters 313 \
    "$@"
