#!/usr/bin/env bash
# SwAV, ResNet-50 4 times as wide, 400 epochs: ImageNet linear top-1 77.9 (published, not measured here).
# 64 GPUs of 40 images, global batch 2560; SLURM limit 72 h.
# Figures: the authors' README (facebookresearch/swav); which cards is not said there.
#
#     DIR=/data/imagenet/train EXP=runs/w4 recipes/swav_RN50w4_400ep.sh [flags of main_swav.py]
set -euo pipefail

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
recipe main_swav.py \
    --arch resnet50w4 --hidden_mlp 8192 --nmb_prototypes 3000 --epsilon 0.05 --use_fp16 true \
    --nmb_crops 2 4 --size_crops 224 96 \
    --min_scale_crops 0.08 0.08 --max_scale_crops 1 0.14 \
    --batch_size 40 --base_lr 4.8 --final_lr 0.0048 --warmup_epochs 10 --start_warmup 0.3 \
    --epochs 400 --freeze_prototypes_niters 313 \
    --queue_length 2560 --epoch_queue_starts 0 \
    "$@"
