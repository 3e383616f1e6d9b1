#!/usr/bin/env bash
# DeepCluster, AlexNet with Sobel, ImageNet: 72.0 mAP of VOC07 classification, fc6-8 with batch-norm scale trained, 70.4 without
# (published: the authors' eval_voc_classif.sh and README; not measured here). One P100, 500 epochs of the paper; the default here is 200.
#
#     DIR=/data/imagenet/train EXP=runs/alexnet recipes/deepcluster_alexnet.sh [flags of main.py]
set -euo pipefail

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
recipe main.py \
    --arch alexnet --sobel --k 10000 --lr 0.05 --wd=-5 --batch 256 --epochs 500 \
    "$@"
