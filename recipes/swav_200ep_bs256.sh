#!/usr/bin/env bash
# SwAV, ResNet-50, 200ep, bs256: ImageNet linear top-1 72.7 (published, not measured here).
# 4 GPUs of 64 images, global batch 256; SLURM limit 72 h. 52 min 10 s an epoch.
# Figures: the authors' README (facebookresearch/swav); which cards is not said there.
#
#     DIR=/data/imagenet/train EXP=runs/swav recipes/swav_200ep_bs256.sh [flags of main_swav.py]
set -euo pipefail

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
recipe main_swav.py \
    --arch resnet50 --nmb_prototypes 3000 --epsilon 0.05 --sinkhorn_iterations 3 --use_fp16 true \
    --nmb_crops 2 6 --size_crops 224 96 \
    --min_scale_crops 0.14 0.05 --max_scale_crops 1 0.14 \
    --batch_size 64 --base_lr 0.6 --final_lr 0.0006 --warmup_epochs 0 \
    --epochs 200 --freeze_prototypes_niters 5005 \
    --queue_length 3840 --epoch_queue_starts 15 \
    "$@"
