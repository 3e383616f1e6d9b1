#!/usr/bin/env bash
# Fetch what the authors released into MODELROOT: networks, cluster assignments, features.
#
#   ./download_model.sh                    DeepCluster's networks: alexnet vgg16 alexnet-caffe vgg16-caffe
#   ./download_model.sh NAME...            only these
#   ./download_model.sh list               all names, their files, and which are there
#
# Names: alexnet vgg16 alexnet-caffe vgg16-caffe, alexnet-clusters vgg16-clusters (both: clusters),
# alexnet-features vgg16-features (both: features; 1.28 million x 4096 numbers, some 20 GB each), all (all of these);
# ResNets by SwAV, DeepCluster-v2 and SeLa-v2: swav_800ep swav_400ep swav_200ep swav_100ep swav_400ep_bs256
# swav_200ep_bs256 swav_400ep_2x224 deepclusterv2_800ep deepclusterv2_400ep deepclusterv2_400ep_2x224 selav2_400ep
# selav2_400ep_2x224 swav_RN50w2_400ep swav_RN50w4_400ep swav_RN50w5_400ep swav_800ep_eval_linear (its probe), or
# resnets (all of these); VGG-16 by DeeperCluster: ours deepcluster_flickr rotnet_flickr rotnet_imagenet, or
# deepercluster (all four).
# A file that broke off lies beside it as FILE.part and is continued; it gets its name once its size is what the
# server says, it is no page and, where Python is at hand, it opens. Exit code 2: a file could not be had.
#
# Settings are variables: MODELROOT=~/deepcluster_models BASE=https://... RETRIES=5 (attempts after the first)
# WAIT=3 (seconds between them) PYTHON=python3 (opens what was fetched; default: .venv, if it is there).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MODELROOT=${MODELROOT:-$HOME/deepcluster_models}
[[ $MODELROOT == /* ]] || MODELROOT=$PWD/$MODELROOT
BASE=${BASE:-https://dl.fbaipublicfiles.com/deepcluster}
python=${PYTHON:-$root/.venv/bin/python}
networks=(alexnet vgg16 alexnet-caffe vgg16-caffe)
clusters=(alexnet-clusters vgg16-clusters)
features=(alexnet-features vgg16-features)
resnets=(swav_{800,400,200,100}ep swav_{400,200}ep_bs256 swav_400ep_2x224 deepclusterv2_{800ep,400ep,400ep_2x224}
    selav2_{400ep,400ep_2x224} swav_RN50w{2,4,5}_400ep swav_800ep_eval_linear)
deepercluster=(ours deepcluster_flickr rotnet_flickr rotnet_imagenet)

die() {
    echo "download_model.sh: $*" >&2
    exit 2
}

unknown() {
    die "$1: unknown; ./download_model.sh list prints the names"
}

files_of() {
    local arch=${1%%-*}
    case $1 in
        alexnet | vgg16) echo "$arch/checkpoint.pth.tar" ;;
        alexnet-caffe | vgg16-caffe) echo "$arch/model.prototxt $arch/model.caffemodel" ;;
        alexnet-clusters | vgg16-clusters) echo "$arch/${arch}_cluster_assignment.pickle" ;;
        alexnet-features | vgg16-features) echo "$arch/${arch}_features.pkl" ;;
        swav_800ep_eval_linear) echo "$1.pth.tar" ;;
        swav_*ep* | deepclusterv2_*ep* | selav2_*ep*)
            [[ " ${resnets[*]} " == *" $1 "* ]] || unknown "$1"
            echo "$1_pretrain.pth.tar"
            ;;
        ours) echo "ours/ours.pth" ;;
        deepcluster_flickr) echo "deepcluster/$1.pth" ;;
        rotnet_flickr | rotnet_imagenet) echo "rotnet/$1.pth" ;;
        *) unknown "$1" ;;
    esac
}

list() {
    echo "from $BASE into $MODELROOT"
    for name in "${networks[@]}" "${clusters[@]}" "${features[@]}" "${resnets[@]}" "${deepercluster[@]}"; do
        for file in $(files_of "$name"); do
            state=""
            [[ ! -f $MODELROOT/$file.part ]] || state="  (begun)"
            [[ ! -f $MODELROOT/$file ]] || state="  (there)"
            printf '%-26s %s%s\n' "$name" "$file" "$state"
        done
    done
}

size_of() {
    if [[ -f $1 ]]; then wc -c <"$1" | tr -d ' '; else echo 0; fi
}

# What curl's exit code and the server's answer mean for the user.
reason() {
    case $1:$2 in
        5:* | 6:* | 7:* | 28:*) echo "offline? cannot reach it; what is already there stays, try again later" ;;
        23:*) echo "cannot write into $MODELROOT: is the disk full?" ;;
        22:403 | 22:404 | 22:410) echo "the server has no such file ($2)" ;;
        22:*) echo "the server refuses or fails ($2); try again later" ;;
        *) echo "broke off (curl's error $1); run again to continue" ;;
    esac
}

# opens FILE PART: fails, with a line of why, where PART is not what FILE's name says.
opens() {
    if head -c 512 "$2" | tr -d '\0' | LC_ALL=C grep -qiE '^[[:space:]]*<|<html'; then
        echo "  it is a page of the web" >&2
        return 1
    fi
    "$python" -c 'import torch' 2>/dev/null || return 0
    cd "$root"
    case $1 in
        *_eval_linear.pth.tar) "$python" -c 'import sys, checkpoint
print(f"  {len(checkpoint.read(sys.argv[1]))} entries")' "$2" 2> >(tail -n 1 >&2) ;;
        */checkpoint.pth.tar | *_pretrain.pth.tar | *.pth) "$python" -c 'import sys; from models import weights
print(f"  {weights.load(sys.argv[1])}")' "$2" 2> >(tail -n 1 >&2) ;;
        */*_cluster_assignment.pickle) "$python" -m formats.released "$2" | sed -n '1s/^/  /p' ;;
    esac
}

# fetch URL PART SIZE: fill PART up to SIZE (empty: unknown), going on where an earlier attempt broke off.
fetch() {
    local tries=0 status code
    while [[ -z $3 || $(size_of "$2") -lt $3 ]]; do
        status=0
        code=$(curl -fL --progress-bar --connect-timeout 20 --speed-limit 1 --speed-time 60 -C - -o "$2" \
            -w '%{http_code}' "$1") || status=$?
        [[ $status -ne 0 ]] || break
        [[ $status -ne 33 ]] || rm -f "$2" # this server cannot continue a file
        [[ $status -ne 23 && $code != 4?? && $tries -lt ${RETRIES:-5} ]] || die "$1: $(reason "$status" "$code")"
        tries=$((tries + 1))
        echo "  broke off at $(size_of "$2") bytes; attempt $((tries + 1))"
        sleep "${WAIT:-3}"
    done
}

get() {
    local url=$BASE/$1 target=$MODELROOT/$1 part=$MODELROOT/$1.part status=0 headers size found
    if [[ -f $target ]]; then
        echo "$1: already there ($(size_of "$target") bytes)"
        return
    fi
    mkdir -p "$(dirname "$target")" 2>/dev/null || die "cannot make the folder $(dirname "$target")"
    headers=$(curl -fsIL --connect-timeout 20 --retry 2 "$url") || status=$?
    found=$(awk 'toupper($1) ~ /^HTTP\// { code = $2 } END { print code }' <<<"$headers")
    [[ $status -eq 0 ]] || die "$url: $(reason "$status" "$found")"
    size=$(awk 'toupper($1) ~ /^HTTP\// { size = "" } tolower($1) == "content-length:" { size = $2 + 0 }
        END { if (size != "") printf "%.0f", size }' <<<"$headers")
    echo "$1: ${size:-unknown number of} bytes, $(size_of "$part") of them there"
    fetch "$url" "$part" "$size"
    found=$(size_of "$part")
    if [[ $found -ne ${size:-$found} ]]; then
        rm -f "$part"
        die "$1: got $found bytes, the server says $size; removed, run again"
    elif ! (opens "$target" "$part"); then
        rm -f "$part"
        die "$1: was fetched whole but is not what it should be; removed, run again"
    fi
    mv "$part" "$target"
    echo "$1: complete ($found bytes)"
}

names=()
for argument in "$@"; do
    case $argument in
        -h | --help) sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$root/download_model.sh" && exit ;;
        list | --list) list && exit ;;
        all) names+=("${networks[@]}" "${clusters[@]}" "${features[@]}") ;;
        clusters) names+=("${clusters[@]}") ;;
        features) names+=("${features[@]}") ;;
        resnets) names+=("${resnets[@]}") ;;
        deepercluster) names+=("${deepercluster[@]}") ;;
        *) files_of "$argument" >/dev/null && names+=("$argument") ;;
    esac
done
command -v curl >/dev/null || die "curl is not installed (Debian: apt install curl)"
[[ -z ${PYTHON:-} ]] || command -v "$python" >/dev/null || die "PYTHON=$PYTHON: no such interpreter"
for name in "${names[@]:-${networks[@]}}"; do
    for file in $(files_of "$name"); do
        get "$file"
    done
done
echo "everything is in $MODELROOT"
