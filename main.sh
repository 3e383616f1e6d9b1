#!/usr/bin/env bash
# Train a network by DeepCluster, without labels.
#
#   ./main.sh [flags of main.py]        the demo: cuts small images from the photographs in demo/pictures, trains
#                                       on them and compares the network with the one it started from
#   ./main.sh DIR [flags of main.py]    trains on the images in DIR with the paper's settings
#
# Settings are variables, e.g. ARCH=vgg16 EXP=runs/vgg ./main.sh /data/imagenet/train; a flag given after DIR
# wins over them. PYTHON=... names an interpreter to use instead of making .venv.
set -euo pipefail

# The demo's recipe (docs/small-data.md says how it was found).
DEMO_ARCH=alexnet
DEMO_SIZE=64 # pixels
DEMO_K=100
DEMO_LR=0.01
DEMO_WD=-5
DEMO_BATCH=64
DEMO_EPOCHS=5
DEMO_SEED=31
DEMO_SOBEL="" # "--sobel" for edges, "" for colour

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
    local exp=${EXP:-exp}
    run "$PY" "$root/main.py" "$DIR" --exp "$exp" --arch "${ARCH:-alexnet}" --lr "${LR:-0.05}" \
        --wd="${WD:--5}" --k "${K:-10000}" --sobel --verbose --workers "$WORKERS" "$@"
}

# With the demo's recipe on the demo's images; an earlier demo run is continued, or only evaluated if it ended.
demo() {
    local images=${DEMO_DIR:-$root/demo_images} exp=${EXP:-$root/exp_demo} resume=()
    local last=$exp/checkpoint.pth.tar first=$exp/checkpoints/checkpoint_0.pth.tar
    run "$PY" "$root/demo.py" "$images"
    if [[ -f $last ]]; then
        echo "demo: $exp holds an earlier demo run: going on from there (rm -r $exp starts afresh)"
        resume=(--resume "$last")
    fi
    run "$PY" "$root/main.py" "$images/train" --exp "$exp" --arch $DEMO_ARCH --image-size $DEMO_SIZE \
        --k $DEMO_K --lr $DEMO_LR --wd=$DEMO_WD --batch $DEMO_BATCH --epochs $DEMO_EPOCHS --seed $DEMO_SEED \
        --verbose --workers "$WORKERS" ${DEMO_SOBEL:+"$DEMO_SOBEL"} ${resume[@]+"${resume[@]}"} "$@"
    run "$PY" "$root/eval_knn.py" --data "$images" --model "$last" --baseline "$first" \
        --layers conv5 fc7.pre --image-size $DEMO_SIZE --workers "$WORKERS" --exp "$exp"
    echo "demo: images in $images"
    echo "demo: network in $last (started from $first)"
    echo "demo: log in $exp/log.jsonl, clusters in $exp/clusters and $exp/assignments.csv"
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
