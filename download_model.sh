#!/usr/bin/env bash
# Fetch what the authors released into MODELROOT: networks, cluster assignments, features.
#
#   ./download_model.sh                    the networks: alexnet vgg16 alexnet-caffe vgg16-caffe
#   ./download_model.sh NAME...            only these
#   ./download_model.sh list               the names, their files, and which are there
#
# Names: alexnet vgg16 alexnet-caffe vgg16-caffe, alexnet-clusters vgg16-clusters (both: clusters),
# alexnet-features vgg16-features (both: features; 1.28 million x 4096 numbers, some 20 GB each), all (all of these).
# A file that is there is left alone. One that broke off lies beside it as FILE.part and is continued; a file
# gets its name once its size is what the server says and, if Python is at hand, once it opens.
# Exit code 0: all are there; 2: a wrong name, no network, or a file that could not be had.
#
# Settings are variables: MODELROOT=~/deepcluster_models BASE=https://... RETRIES=5 (attempts after the first)
# WAIT=3 (seconds between them) PYTHON=python3 (opens what was fetched; default: .venv, if it is there).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MODELROOT=${MODELROOT:-$HOME/deepcluster_models}
BASE=${BASE:-https://dl.fbaipublicfiles.com/deepcluster}
RETRIES=${RETRIES:-5}
WAIT=${WAIT:-3}

networks=(alexnet vgg16 alexnet-caffe vgg16-caffe)
clusters=(alexnet-clusters vgg16-clusters)
features=(alexnet-features vgg16-features)

die() {
    echo "download_model.sh: $*" >&2
    exit 2
}

# The files of a name, relative to BASE and to MODELROOT.
files_of() {
    local arch=${1%%-*}
    case $1 in
        alexnet | vgg16) echo "$arch/checkpoint.pth.tar" ;;
        alexnet-caffe | vgg16-caffe) echo "$arch/model.prototxt $arch/model.caffemodel" ;;
        alexnet-clusters | vgg16-clusters) echo "$arch/${arch}_cluster_assignment.pickle" ;;
        alexnet-features | vgg16-features) echo "$arch/${arch}_features.pkl" ;;
        *) die "$1: unknown; names are ${networks[*]} ${clusters[*]} ${features[*]} clusters features all list" ;;
    esac
}

list() {
    local name file state
    echo "from $BASE into $MODELROOT"
    for name in "${networks[@]}" "${clusters[@]}" "${features[@]}"; do
        for file in $(files_of "$name"); do
            state=""
            [[ ! -f $MODELROOT/$file.part ]] || state="  (begun)"
            [[ ! -f $MODELROOT/$file ]] || state="  (there)"
            printf '%-18s %s%s\n' "$name" "$file" "$state"
        done
    done
}

size_of() {
    if [[ -f $1 ]]; then wc -c <"$1" | tr -d ' '; else echo 0; fi
}

# The size that the server gives for a URL; empty if it gives none. Dies where there is no such file or no server.
remote_size() {
    local headers status=0
    headers=$(curl -sSIL --connect-timeout 20 --retry 2 --retry-delay "$WAIT" "$1" 2>/dev/null) || status=$?
    explain "$1" "$status" "$(awk 'toupper($1) ~ /^HTTP\// { code = $2 } END { print code }' <<<"$headers")"
    awk 'toupper($1) ~ /^HTTP\// { size = "" } tolower($1) == "content-length:" { size = $2 + 0 }
        END { if (size != "") printf "%.0f\n", size }' <<<"$headers"
}

# Dies, in a line, where curl's exit status or the HTTP code say that another attempt would not help.
explain() {
    case $2 in
        0) ;;
        5 | 6 | 7) die "offline? cannot reach ${1%/*/*}; what is already there stays, try again later" ;;
        23) die "cannot write into $MODELROOT: is the disk full?" ;;
        28) die "offline? no answer from ${1%/*/*}; what is already there stays, try again later" ;;
        35 | 60) die "no secure connection to ${1%/*/*} (curl's error $2)" ;;
    esac
    case $3 in
        404 | 403 | 410) die "$1: the server has no such file ($3)" ;;
        4?? | 5??) die "$1: the server refuses or fails ($3); try again later" ;;
    esac
}

# fetch URL PART SIZE: fill PART up to SIZE (empty: unknown), going on where an earlier attempt broke off.
fetch() {
    local url=$1 part=$2 size=$3 attempt status code found
    for ((attempt = 0; attempt <= RETRIES; attempt++)); do
        if [[ -n $size && $(size_of "$part") -ge $size ]]; then return; fi
        if ((attempt > 0)); then
            echo "  broke off at $(size_of "$part") bytes; attempt $((attempt + 1)) of $((RETRIES + 1))"
            sleep "$WAIT"
        fi
        status=0
        code=$(curl -fL --progress-bar --connect-timeout 20 --speed-limit 1 --speed-time 60 \
            -C - -o "$part" -w '%{http_code}' "$url") || status=$?
        if [[ -z $size && $status -eq 0 ]]; then return; fi
        if [[ -n $size && $code == 416 ]]; then
            found=$(size_of "$part")
            rm -f "$part"
            die "$url: ends after $found bytes, the server says $size; removed, run again"
        fi
        # 33: the server cannot continue a file; 416: there is nothing after what we have. Begin again.
        if [[ $status -eq 33 || $code == 416 ]]; then
            rm -f "$part"
        elif [[ $status -eq 23 || $code == 4?? || $attempt -eq $RETRIES ]]; then
            explain "$url" "$status" "$code"
        fi
    done
    [[ -n $size ]] || die "$url: broke off $((RETRIES + 1)) times; run again to continue"
}

# The interpreter that opens what was fetched; empty: none, or none with PyTorch.
find_python() {
    local python=${PYTHON:-$root/.venv/bin/python}
    if [[ -n ${PYTHON:-} ]]; then
        command -v "$python" >/dev/null || die "PYTHON=$PYTHON: no such interpreter"
    fi
    if "$python" -c 'import torch' 2>/dev/null; then echo "$python"; fi
}

# Open a file under the name it will have; fails, with a line of why, if it is not what it should be.
opens() {
    case $1 in
        */checkpoint.pth.tar)
            (cd "$root" && "$python" -c 'import sys, checkpoint
net = checkpoint.load_model(sys.argv[1])
print(f"  {net.arch}, Sobel: {net.sobel is not None}")' "$2" 2> >(tail -n 1 >&2)) ;;
        */*_cluster_assignment.pickle) "$python" "$root/released.py" "$2" | sed -n '1s/^/  /p' ;;
    esac
}

get() {
    local file=$1 target=$MODELROOT/$1 part=$MODELROOT/$1.part size found
    if [[ -f $target ]]; then
        echo "$file: already there ($(size_of "$target") bytes)"
        return
    fi
    mkdir -p "$(dirname "$target")" 2>/dev/null || die "cannot make the folder $(dirname "$target")"
    size=$(remote_size "$BASE/$file")
    echo "$file: ${size:-unknown number of} bytes, $(size_of "$part") of them there"
    fetch "$BASE/$file" "$part" "$size"
    found=$(size_of "$part")
    if [[ -n $size && $found -lt $size ]]; then
        die "$file: $found of $size bytes after $((RETRIES + 1)) attempts; run again to continue"
    fi
    if [[ -n $size && $found -ne $size ]]; then
        rm -f "$part"
        die "$file: got $found bytes, the server says $size; removed, run again"
    fi
    if [[ -n $python ]] && ! opens "$target" "$part"; then
        rm -f "$part"
        die "$file: was fetched whole but does not open; removed, run again"
    fi
    mv "$part" "$target"
    echo "$file: complete ($found bytes)"
}

names=()
for argument in "$@"; do
    case $argument in
        -h | --help)
            sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$root/download_model.sh"
            exit
            ;;
        list | --list) list && exit ;;
        all) names+=("${networks[@]}" "${clusters[@]}" "${features[@]}") ;;
        clusters) names+=("${clusters[@]}") ;;
        features) names+=("${features[@]}") ;;
        *)
            files_of "$argument" >/dev/null
            names+=("$argument")
            ;;
    esac
done
[[ ${#names[@]} -gt 0 ]] || names=("${networks[@]}")
command -v curl >/dev/null || die "curl is not installed (Debian: apt install curl)"
python=$(find_python)
[[ -n $python ]] || echo "no Python with PyTorch at hand (PYTHON=...): files are checked by size only"

for name in "${names[@]}"; do
    for file in $(files_of "$name"); do
        get "$file"
    done
done
echo "everything is in $MODELROOT"
