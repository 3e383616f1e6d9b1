# shellcheck shell=bash
# To be sourced by a recipe, which then calls `recipe SCRIPT FLAG...`.
#
# DIR names the images, EXP the folder of the run, GPUS how many processes on this machine (default: its GPUs, or
# one on a CPU). Of an evaluation DIR has train/ and val/, and MODEL is the network. Flags given to the recipe win
# over its own. PRINT=1 prints the script and its flags, one a line, for slurm/train.sbatch. PYTHON=... names an
# interpreter to use instead of making .venv.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

recipe() {
    local images=("${DIR:-}") needed="DIR to the folder of images"
    if [[ $1 == eval_* ]]; then
        images=(--data "${DIR:-}")
        needed+=", MODEL to a checkpoint"
        set -- "$1" --model "${MODEL:-}" "${@:2}"
    fi
    if [[ -n ${PRINT:-} ]]; then
        printf '%s\n' "$@"
        return
    fi
    local script=$1 gpus
    shift
    if [[ -z ${DIR:-} || ($script == eval_* && -z ${MODEL:-}) ]]; then
        sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$0"
        echo "${0##*/}: set $needed" >&2
        exit 2
    fi
    # shellcheck source=../env.sh
    . "$root/env.sh" requirements.txt
    # Without nvidia-smi, or without a driver, there are none.
    gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)}
    local launcher=("$PY")
    [[ $gpus -le 1 ]] || launcher+=(-m torch.distributed.run --standalone --nproc-per-node "$gpus")
    run "${launcher[@]}" "$root/$script" "${images[@]}" --exp "${EXP:-exp}" --resume auto "$@"
}
