#!/usr/bin/env bash
# SwAV, ResNet-50 2 times as wide, 400 epochs: ImageNet linear top-1 77.3 (published, not measured here).
# 128 GPUs of 32 images, global batch 4096; SLURM limit 72 h.
# Figures: the authors' README (facebookresearch/swav); which cards is not said there.
#
#     DIR=/data/imagenet/train EXP=runs/w2 recipes/swav_RN50w2_400ep.sh [flags of main_swav.py]
set -euo pipefail

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
recipe main_swav.py \
    --arch resnet50w2 --hidden_mlp 8192 --nmb_prototypes 3000 --epsilon 0.05 --use_fp16 true \
    --nmb_crops 2 4 --size_crops 224 96 \
    --min_scale_crops 0.14 0.05 --max_scale_crops 1 0.14 \
    --batch_size 32 --base_lr 4.8 --final_lr 0.0048 --warmup_epochs 10 --start_warmup 0.3 \
    --epochs 400 --freeze_prototypes_niters 313 \
    "$@"
