#!/usr/bin/env bash
# Run the tests.
#
#   ./test.sh                      the whole suite, with the coverage of the modules below the scripts (at least 90 %)
#   ./test.sh tests/test_data.py   some of it: anything that pytest understands
#
# TEST_PROCESSES says in how many processes the whole suite runs (default: 2, of about 1.5 GB each).
# PYTHON=... names an interpreter to use instead of making .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=env.sh
. "$root/env.sh" requirements.txt requirements-extra.txt requirements-dev.txt
cd "$root"

coverage=()
if [[ $# -eq 0 ]]; then
    for module in algorithms checkpoint clustering data evaluation features models training; do
        coverage+=("--cov=$module")
    done
    coverage+=(--cov-report=term-missing:skip-covered --cov-fail-under=90)
    # Two processes of one thread each: most tests are too small for several threads.
    coverage+=(-n "${TEST_PROCESSES:-2}" --dist worksteal)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
run "$PY" -m pytest ${coverage[@]+"${coverage[@]}"} "$@"
