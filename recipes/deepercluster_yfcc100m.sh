#!/usr/bin/env bash
# DeeperCluster, VGG-16 with Sobel, on 96 million images of YFCC100M: ImageNet top-1 of a network fine-tuned from it 74.9
# (published, abstract of arXiv 1905.01278v3; not measured here). 64 GPUs of 48 images, global batch 3072; hours not published.
#
#     DIR=/data/yfcc100m EXP=runs/deeper recipes/deepercluster_yfcc100m.sh [flags of main_deepercluster.py]
set -euo pipefail

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
recipe main_deepercluster.py \
    --arch vgg16wide --sobel true --k 320000 --super_classes 16 --dim_pca 4096 \
    --lr 0.1 --wd 0.00001 --batch_size 48 --nepochs 100 --reassignment 3 --niter 10 \
    "$@"
