#!/usr/bin/env bash
# A fresh machine -> virtual environment -> install -> `tpllm demo`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage() {
    cat <<'USAGE'
usage: launch/demo.sh [OPTIONS OF tpllm demo]

Makes a virtual environment, installs tpllm and an MPI into it, and runs `tpllm demo`: a small LLaMA converted, built
into one engine a rank and run under mpirun on this machine. Needs Python >= 3.10; g++ for the default backend. The next
time, what is installed is used.

  launch/demo.sh -n 4                 four ranks
  launch/demo.sh --backend eager      no compiler needed
  launch/demo.sh -- --help            the options of tpllm demo

What a site can change (Python, place, pip options, MPI, torch) is listed in launch/env.sh.
USAGE
}

case ${1:-} in
    -h | --help) usage; exit ;;
    --) shift ;;
esac

tpllm_setup "${TPLLM_EXTRAS-mpi}"

compiler=${CXX:-g++}
command -v "${compiler%% *}" >/dev/null ||
    say "no $compiler: backend inductor needs a C++ compiler (apt-get install g++); the demo will use backend eager"

say "\$ tpllm demo${*:+ $*}"
exec "$TPLLM_VENV/bin/tpllm" demo "$@" </dev/null
