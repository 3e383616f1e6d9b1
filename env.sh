# shellcheck shell=bash
# To be sourced:  . env.sh requirements.txt [requirements-....txt]
#
# Sets PY to a Python that has these requirements, and defines `run`. PYTHON=... names an interpreter to use
# as it is; otherwise .venv beside this file is made with python3 once and reused for as long as the
# requirements files stay what they were.

# Threads that wait for work leave their core to the loader's workers: on two cores extraction is a tenth faster.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

# Print a command, then run it.
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

# One line on stderr, then the exit code of a user's mistake.
die() {
    echo "${0##*/}: $*" >&2
    exit 2
}

# make_environment VENV FOLDER FILE...: a virtual environment VENV with what FOLDER/FILE... list.
make_environment() {
    local venv=$1 folder=$2 file line
    shift 2
    local stamp=$venv/installed-requirements.txt wanted=() missing=() options=()
    for file in "$@"; do
        line="$(cksum <"$folder/$file") $file"
        wanted+=("$line")
        options+=(-r "$folder/$file")
        grep -qxF -- "$line" "$stamp" 2>/dev/null || missing+=("$file")
    done
    if [[ ${#missing[@]} -eq 0 ]] && "$venv/bin/python" -c '' 2>/dev/null; then
        echo "environment: $venv (has ${*})"
        return
    fi
    echo "environment: installing $* into $venv (minutes and a few GB the first time; see $venv/install.log)"
    if ! "$venv/bin/python" -c '' 2>/dev/null; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            die "python3 must be Python 3.11 or newer; name one with PYTHON=..."
        python3 -m venv --clear "$venv" ||
            die "python3 -m venv failed (Debian: apt install python3-venv); or name an interpreter with PYTHON=..."
    fi
    rm -f "$stamp"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check "${options[@]}" >"$venv/install.log" 2>&1; then
        tail -n 5 "$venv/install.log" >&2
        die "pip could not install $*; the whole output is in $venv/install.log"
    fi
    printf '%s\n' "${wanted[@]}" >"$stamp.tmp"
    mv "$stamp.tmp" "$stamp"
}

if [[ -n ${PYTHON:-} ]]; then
    command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON: no such interpreter"
    # An absolute path, so that it still holds in another folder and for the scripts that are called.
    [[ $PYTHON != */* ]] || PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
    export PYTHON
    PY=$PYTHON
    echo "environment: $PY (named by PYTHON, used as it is)"
else
    env_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    make_environment "$env_folder/.venv" "$env_folder" "$@"
    # shellcheck disable=SC2034  # for the script that sources this file
    PY=$env_folder/.venv/bin/python
fi
