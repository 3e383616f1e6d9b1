#!/usr/bin/env bash
# DeepCluster, VGG-16 with Sobel, ImageNet (the second network that the authors released; hours not published).
#
#     DIR=/data/imagenet/train EXP=runs/vgg16 recipes/deepcluster_vgg16.sh [flags of main.py]
set -euo pipefail

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
recipe main.py \
    --arch vgg16 --sobel --k 10000 --lr 0.05 --wd=-5 --batch 256 --epochs 200 \
    "$@"
