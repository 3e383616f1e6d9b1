#!/usr/bin/env bash
# Nearest neighbours and k-means on a network's features: what they know of the classes, nothing is trained.
#
#   ./eval_knn.sh DIR [flags of eval_knn.py]     DIR has train/ and val/ with class sub-folders
#
# Settings are variables, e.g. MODEL=exp/checkpoint.pth.tar LAYERS="conv3 conv5" ./eval_knn.sh /data/imagenet;
# a flag given after DIR wins over them. PYTHON=... names an interpreter to use instead of making .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

DIR=${DIR:-}
if [[ $# -gt 0 && $1 != -* ]]; then
    DIR=$1
    shift
fi
if [[ ${1:-} =~ ^(-h|--help)$ || -z $DIR ]]; then
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$root/eval_knn.sh"
    [[ -n ${1:-} ]] && exit
    echo "eval_knn.sh: DIR is missing" >&2
    exit 2
fi
EXP=${EXP:-exp}
MODEL=${MODEL:-$EXP/checkpoint.pth.tar}
LAYERS=${LAYERS:-} # empty: the last convolution and the 4096-unit feature
K=${K:-10 20 100 200}
WORKERS=${WORKERS:-4}

# shellcheck source=env.sh
. "$root/env.sh" requirements.txt
read -ra layers <<<"$LAYERS"
read -ra neighbours <<<"$K"
run "$PY" "$root/eval_knn.py" --data "$DIR" --model "$MODEL" --exp "$EXP" --k "${neighbours[@]}" \
    ${layers[@]+--layers "${layers[@]}"} --workers "$WORKERS" "$@"
