#!/usr/bin/env bash
# Put images, seen or new, into the clusters of a run.
#
#   ./assign.sh DIR [flags of assign.py]     DIR is a folder of images or a .txt file of paths
#
# Settings are variables, e.g. EXP=exp FORMAT=links OUT=clusters ./assign.sh images; a flag given after DIR wins
# over them. FORMAT is csv, pickle or links. PYTHON=... names an interpreter to use instead of making .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

DIR=${DIR:-}
if [[ $# -gt 0 && $1 != -* ]]; then
    DIR=$1
    shift
fi
if [[ ${1:-} =~ ^(-h|--help)$ || -z $DIR ]]; then
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$root/assign.sh"
    [[ -n ${1:-} ]] && exit
    echo "assign.sh: DIR is missing" >&2
    exit 2
fi
EXP=${EXP:-exp}
FORMAT=${FORMAT:-csv}
case $FORMAT in
csv) OUT=${OUT:-assignments.csv} ;;
pickle) OUT=${OUT:-assignments.pickle} ;;
*) OUT=${OUT:-clusters} ;;
esac
WORKERS=${WORKERS:-4}

# shellcheck source=env.sh
. "$root/env.sh" requirements.txt
run "$PY" "$root/assign.py" "$DIR" --run "$EXP" --format "$FORMAT" --out "$OUT" --workers "$WORKERS" "$@"
