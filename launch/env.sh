# shellcheck shell=bash
# Sourced by the scripts beside it: what a site may want to change, and the virtual environment.

TPLLM_ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Each of these can be set in the environment instead.
TPLLM_PYTHON=${TPLLM_PYTHON:-python3}       # Python >= 3.10 that makes the environment; its torch >= 2.11 is reused
TPLLM_VENV=${TPLLM_VENV:-$TPLLM_ROOT/.venv} # the environment
TPLLM_PIP_ARGS=${TPLLM_PIP_ARGS:-}          # added to every pip install, for example an index of CPU builds of torch
# TPLLM_EXTRAS: what to install with tpllm; each script has its own default. `mpi` among them brings mpirun and libmpi
#   as a wheel; leave it out to use your site's MPI: TPLLM_EXTRAS= for demo.sh, TPLLM_EXTRAS=dev for test.sh.

[[ $TPLLM_VENV = /* ]] || TPLLM_VENV=$PWD/$TPLLM_VENV
# In the environment: .tpllm-made, it is these scripts' own and may be made anew; and what a whole install put there.
TPLLM_STAMP=$TPLLM_VENV/.tpllm-installed

say() {
    local script=${0##*/}
    echo "[${script%.sh}] $*"
}

# The end, with the exit code that tpllm gives for "this machine lacks something".
die() {
    say "error: $*" >&2
    exit 10
}

# tpllm_setup EXTRAS: afterwards $TPLLM_VENV holds a whole install of this clone with these extras.
tpllm_setup() {
    local stamp
    check_python
    stamp=$({ "$TPLLM_PYTHON" -VV && echo "$TPLLM_ROOT [$1]" && cat "$TPLLM_ROOT"/{pyproject.toml,constraints.txt}; } | cksum)
    if [ "$(cat "$TPLLM_STAMP" 2>/dev/null)" = "$stamp" ]; then
        say "already installed: $TPLLM_VENV"
        return
    fi
    make_venv
    install "$1"
    echo "$stamp" >"$TPLLM_STAMP"
}

check_python() {
    command -v "$TPLLM_PYTHON" >/dev/null || die "there is no $TPLLM_PYTHON: install Python >= 3.10 or set TPLLM_PYTHON"
    "$TPLLM_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' </dev/null ||
        die "$TPLLM_PYTHON is $("$TPLLM_PYTHON" --version 2>&1 || :); tpllm needs Python >= 3.10: set TPLLM_PYTHON"
}

# has_torch PYTHON: it can import a torch that is new enough; prints its version and where its packages are.
has_torch() {
    "$1" -c 'import os, sys, torch
print(torch.__version__, os.path.dirname(os.path.dirname(torch.__file__)))
sys.exit(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11))' 2>/dev/null </dev/null
}

make_venv() {
    local site="" torch
    if [ -e "$TPLLM_VENV/.tpllm-made" ]; then
        [ -e "$TPLLM_STAMP" ] && return # with other extras, or an older pyproject.toml
        say "making $TPLLM_VENV anew: an earlier install did not finish"
        rm -rf "$TPLLM_VENV"
    elif [ -e "$TPLLM_VENV/pyvenv.cfg" ]; then
        say "installing into $TPLLM_VENV, which is there"
        return
    elif [ -e "$TPLLM_VENV" ]; then
        die "$TPLLM_VENV is there and is no virtual environment: remove it or set TPLLM_VENV"
    fi
    { mkdir -p "$TPLLM_VENV" && touch "$TPLLM_VENV/.tpllm-made"; } || die "cannot write $TPLLM_VENV: set TPLLM_VENV"
    torch=$(has_torch "$TPLLM_PYTHON") && site=--system-site-packages || torch=""
    say "\$ $TPLLM_PYTHON -m venv $site $TPLLM_VENV"
    if ! "$TPLLM_PYTHON" -m venv $site "$TPLLM_VENV" </dev/null; then
        rm -rf "$TPLLM_VENV"
        die "no virtual environment could be made; Debian and Ubuntu keep venv in a package: apt-get install python3-venv"
    fi
    if [ -n "$torch" ] && ! has_torch "$TPLLM_VENV/bin/python" >/dev/null; then
        # $TPLLM_PYTHON is itself in a virtual environment, whose packages the new one does not see.
        echo "${torch#* }" >"$(echo "$TPLLM_VENV"/lib/python3*/site-packages)/tpllm-torch.pth"
    fi
}

# install EXTRAS: tpllm, editable, and what it depends on.
install() {
    local torch command=(-m pip install --disable-pip-version-check)
    if torch=$(has_torch "$TPLLM_VENV/bin/python"); then
        say "torch ${torch% *} is there and is reused"
    else
        say "torch: the version of constraints.txt. On Linux pip's default is a CUDA build of some gigabytes; for a CPU" \
            "build give pip an index that has one: TPLLM_PIP_ARGS='--index-url …'"
        command+=(-c "$TPLLM_ROOT/constraints.txt")
    fi
    # compat: the clone's path itself. Setuptools' own way comes after the current directory, in which a clone that is
    # named tpllm would be taken for the package.
    command+=(--config-settings editable_mode=compat)
    # shellcheck disable=SC2206 # several words are wanted
    command+=($TPLLM_PIP_ARGS -e "$TPLLM_ROOT${1:+[$1]}")
    say "\$ pip ${command[*]:2}"
    "$TPLLM_VENV/bin/python" "${command[@]}" </dev/null || die "pip failed (above); run this again to go on"
}
