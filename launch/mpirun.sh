#!/usr/bin/env bash
# A verb over the hosts of a hostfile with nothing but mpirun; `tpllm launch` does the same with more care.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage() {
    cat <<'USAGE'
usage: launch/mpirun.sh HOSTFILE NP VERB [OPTIONS OF THE VERB]

Shows and runs the bare mpirun command that starts NP ranks of `tpllm VERB` on the hosts of HOSTFILE, which is in the
dialect of this mpirun (see hostfiles/). All hosts must see the virtual environment and the model under the same paths.

  launch/mpirun.sh hostfiles/localhost 4 run --engine-dir engine-tp4 --input-text "The capital of France is"

What a site can change: TPLLM_VENV (see launch/env.sh); MPIRUN, by default the environment's or else the PATH's; and
MPIRUN_ARGS, more words for it.
USAGE
}

case ${1:-} in -h | --help) usage; exit ;; esac
(($# >= 3)) || { usage >&2; exit 2; }
hostfile=$1 np=$2
shift 2
[ -f "$hostfile" ] || { say "no such hostfile: $hostfile" >&2; exit 2; }

MPIRUN=${MPIRUN:-$(PATH=$TPLLM_VENV/bin:$PATH command -v mpirun || :)}
[ -n "$MPIRUN" ] || die "no mpirun: pip install 'tpllm[mpi]' brings one, or load your site's MPI"

command=("$MPIRUN")
# Unbound, as a rank has threads. Open MPI gives other hosts no variables but those of -x; Hydra gives them all.
case $("$MPIRUN" --version 2>&1 </dev/null || :) in
    *"Open MPI"* | *PRRTE*) command+=(--hostfile "$hostfile" --bind-to none -x PATH) ;;
    *) command+=(-f "$hostfile" -bind-to none) ;;
esac
# shellcheck disable=SC2206 # several words are wanted
command+=(${MPIRUN_ARGS:-} -n "$np" "$TPLLM_VENV/bin/tpllm" "$@")

say "\$$(printf ' %q' "${command[@]}")"
# No stdin: mpirun would take the terminal's, or that of a loop around this script.
exec "${command[@]}" </dev/null
