#!/usr/bin/env bash
# A fresh machine -> virtual environment -> install -> the test suite; tests that need ranks start mpirun themselves.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage() {
    cat <<'USAGE'
usage: launch/test.sh [--full] [-- PYTEST OPTIONS]

Makes a virtual environment, installs tpllm with what its tests need, and runs ruff, mypy and, when these find nothing,
the tests that need no GPU. Ends with pytest's exit code.

  --full    the long cases too
  --        the rest goes to pytest: launch/test.sh -- -k mapping -x

What a site can change (Python, place, pip options, MPI, torch) is listed in launch/env.sh.
USAGE
}

selection="not full and not gpu"
while (($#)); do
    case $1 in
        --full) selection="not gpu" ;;
        -h | --help) usage; exit ;;
        --) shift; break ;;
        *) say "no such option: $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

tpllm_setup "${TPLLM_EXTRAS-dev,mpi}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cd "$TPLLM_ROOT"

run() {
    say "\$$(printf ' %q' "$@")"
    "$TPLLM_VENV/bin/python" -m "$@" </dev/null
}

code=0
run ruff check . || code=$?
run mypy || code=$?
if ((code)); then
    say "ruff or mypy found something (above): no test was run"
    exit "$code"
fi
run pytest -m "$selection" "$@" || code=$?
say "pytest ended with $code; $SECONDS s in all"
exit "$code"
