#!/usr/bin/env bash
# Train a network without labels.
#
#   ./main.sh [flags]        the demo: cuts small images from the photographs in demo/pictures, trains on them by
#                            DeepCluster and compares the network with the one it started from
#   ./main.sh DIR [flags]    trains on the images in DIR with the paper's settings
#
# METHOD=deepclusterv2, METHOD=swav or METHOD=deepercluster trains by that method, with the flags of its script;
# recipes/ holds the settings of the published runs.
# Settings are variables, e.g. ARCH=vgg16 EXP=runs/vgg ./main.sh /data/imagenet/train; a flag given after DIR
# wins over them. PYTHON=... names an interpreter to use instead of making .venv.
set -euo pipefail

METHOD=${METHOD:-deepcluster}
# The demo's recipe of each method (docs/small-data.md says how it was found); the script, then its flags.
DEMO_SIZE=64 # pixels
DEMO_SEED=31
LAYERS=(conv5 fc7.pre) # to be evaluated
CROPS=(--nmb_crops 2 --size_crops $DEMO_SIZE --min_scale_crops 0.3 --max_scale_crops 1 --jitter_strength 0.4 --blur 0)
HEAD=(--hidden_mlp 512 --batch_size 64 --no-larc --base_lr 0.1 --final_lr 0.001 --warmup_epochs 0 --epochs 4)
case $METHOD in
deepcluster)
    MAIN=main.py
    DEMO=(--arch alexnet --image-size $DEMO_SIZE --k 100 --lr 0.01 --wd=-5 --batch 64 --epochs 5)
    ;;
deepclusterv2)
    MAIN=main_deepclusterv2.py
    DEMO=(--arch resnet18 "${CROPS[@]}" "${HEAD[@]}" --nmb_prototypes 200 200 200)
    LAYERS=(layer3 avgpool)
    ;;
swav)
    MAIN=main_swav.py
    # Fewer prototypes than a batch has images, or codes cannot spread over them; colours as they are.
    DEMO=(--arch resnet18 "${CROPS[@]}" "${HEAD[@]}" --nmb_prototypes 40 --freeze_prototypes_niters 62
        --jitter_strength 0)
    LAYERS=(layer3 avgpool)
    ;;
deepercluster)
    MAIN=main_deepercluster.py
    DEMO=(--arch alexnet --image-size $DEMO_SIZE --super_classes 8 --k 200 --dim_pca 256 --reassignment 1 --lr 0.01
        --wd 0.00001 --batch_size 64 --nepochs 3)
    ;;
*)
    echo "main.sh: METHOD=$METHOD: choose deepcluster, deepclusterv2, swav or deepercluster" >&2
    exit 2
    ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

DIR=${DIR:-}
if [[ $# -gt 0 && $1 != -* ]]; then
    DIR=$1
    shift
fi
WORKERS=${WORKERS:-$((cores < 12 ? cores : 12))} # 12 as the authors, or what there is

# The comment at the top of this file.
usage() {
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$root/main.sh"
}

# With the paper's settings on the user's images.
train() {
    local exp=${EXP:-exp} settings=()
    if [[ $METHOD == deepcluster ]]; then
        settings=(--arch "${ARCH:-alexnet}" --lr "${LR:-0.05}" --wd="${WD:--5}" --k "${K:-10000}" --sobel)
    fi
    run "$PY" "$root/$MAIN" "$DIR" --exp "$exp" ${settings[@]+"${settings[@]}"} --verbose --workers "$WORKERS" "$@"
}

# With the demo's recipe on the demo's images; an earlier demo run is continued, or only evaluated if it ended.
demo() {
    local images=${DEMO_DIR:-$root/demo_images} exp=$root/exp_demo
    [[ $METHOD == deepcluster ]] || exp+=_$METHOD
    exp=${EXP:-$exp}
    local last=$exp/checkpoint.pth.tar first=$exp/checkpoints/checkpoint_0.pth.tar
    run "$PY" "$root/demo.py" "$images"
    [[ ! -f $last ]] ||
        echo "demo: $exp holds an earlier demo run: going on from there (rm -r $exp starts afresh)"
    run "$PY" "$root/$MAIN" "$images/train" --exp "$exp" "${DEMO[@]}" --seed $DEMO_SEED --verbose \
        --workers "$WORKERS" --resume auto "$@"
    run "$PY" "$root/eval_knn.py" --data "$images" --model "$last" --baseline "$first" \
        --layers "${LAYERS[@]}" --workers "$WORKERS" --exp "$exp"
    echo "demo: images in $images"
    echo "demo: network in $last (started from $first)"
    echo "demo: log in $exp/log.jsonl, clusters in $exp/assignments.csv"
    echo "demo: look at $exp/report.html and $exp/clusters.html"
}

if [[ -z $DIR && ${1:-} =~ ^(-h|--help)$ ]]; then
    usage
    exit
fi
if [[ -n $DIR && ! -e $DIR ]]; then
    echo "main.sh: $DIR: no such folder or list of images" >&2
    exit 2
fi
# shellcheck source=env.sh
. "$root/env.sh" requirements.txt
if [[ -n $DIR ]]; then train "$@"; else demo "$@"; fi
