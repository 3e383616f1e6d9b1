#!/usr/bin/env bash
# Features of a layer of a network for every image of a folder, in a file.
#
#   ./extract.sh DIR [flags of extract.py]     DIR is a folder of images or a .txt file of paths
#
# Settings are variables, e.g. MODEL=exp/checkpoint.pth.tar LAYER=conv5 OUT=features/conv5 ./extract.sh images;
# a flag given after DIR wins over them. FORMAT is npy, parquet or pickle. After a kill, the same command goes on.
# PYTHON=... names an interpreter to use instead of making .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

DIR=${DIR:-}
if [[ $# -gt 0 && $1 != -* ]]; then
    DIR=$1
    shift
fi
if [[ ${1:-} =~ ^(-h|--help)$ || -z $DIR ]]; then
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$root/extract.sh"
    [[ -n ${1:-} ]] && exit
    echo "extract.sh: DIR is missing" >&2
    exit 2
fi
MODEL=${MODEL:-exp/checkpoint.pth.tar}
LAYER=${LAYER:-fc7.pre}
FORMAT=${FORMAT:-npy}
OUT=${OUT:-features/$LAYER}
WORKERS=${WORKERS:-4}

requirements=(requirements.txt)
[[ "$FORMAT $*" != *parquet* ]] || requirements+=(requirements-extra.txt)
# shellcheck source=env.sh
. "$root/env.sh" "${requirements[@]}"
run "$PY" "$root/extract.py" "$DIR" --model "$MODEL" --layer "$LAYER" --format "$FORMAT" --out "$OUT" \
    --workers "$WORKERS" "$@"
