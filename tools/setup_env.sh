# Sourced by run_train.sh and tests/run.sh: finds or makes a Python that has what pyproject.toml asks for.
#
#   root=...                 the repository, set by the caller
#   setup_env [EXTRA ...]    sets PY, exports PYTHONPATH; installs only if something is missing
#
# Which Python: the active virtual environment or conda environment; else .venv in the repository; else a system
# Python that already has everything (nothing is ever installed there); else a new .venv.
# shellcheck shell=bash
: "${root:?set by the caller}"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# The first system Python that torch can use; empty if there is none.
system_python() {
    local name
    for name in python3 python3.12 python3.11 python3.13; do
        if command -v "$name" >/dev/null && is_new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
}

lacks() {
    "$PY" "$root/tools/missing_requirements.py" "$@"
}

install_into() {
    local prefix=$1 started=$SECONDS target=$root
    shift
    if [ "$#" -gt 0 ]; then
        local IFS=, # pip wants the extras as [a,b]
        target="${root}[$*]"
    fi
    # Left behind by an installation that was stopped half-way: the next start finishes it.
    touch "$prefix/titan_fp8.installing"
    printf 'Installing titan_fp8 into %s (once, some minutes) ...\n' "$prefix" >&2
    local pip=("$PY" -m pip install --quiet --disable-pip-version-check)
    local remedy="see pip's message above, then start again"
    # torch first, and only if missing: a version that fits this machine's GPU driver must not be replaced.
    if lacks | grep -q '^torch[<>=]'; then
        "${pip[@]}" torch==2.13.0 || fail "torch 2.13.0 could not be installed into $prefix: $remedy"
    fi
    "${pip[@]}" -e "$target" || fail "titan_fp8's requirements could not be installed into $prefix: $remedy"
    rm -f "$prefix/titan_fp8.installing"
    printf 'Installed in %d s.\n' "$((SECONDS - started))" >&2
}

# Sets PY, and prefix unless PY is a system Python. False if there is something to do first: to make .venv where prefix is
# empty, to install.
is_ready() {
    prefix=""
    if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        prefix=$VIRTUAL_ENV
    elif [ -n "${CONDA_PREFIX:-}" ] && [ -x "$CONDA_PREFIX/bin/python" ]; then
        prefix=$CONDA_PREFIX
    elif [ -x "$root/.venv/bin/python" ]; then
        prefix=$root/.venv
    fi
    if [ -n "$prefix" ]; then
        PY=$prefix/bin/python
        is_new_enough "$PY" ||
            fail "Python 3.11 or newer is needed, but $prefix has $("$PY" --version 2>&1); deactivate it, or make a newer one"
    else
        PY=$(system_python)
        [ -n "$PY" ] ||
            fail "Python 3.11 or newer is needed, got $(python3 --version 2>&1 || true); install python3.12 and start again"
    fi
    ! [ -e "$prefix/titan_fp8.installing" ] && [ -z "$(lacks "$@")" ]
}

setup_env() {
    local prefix
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    if is_ready "$@"; then
        return
    fi
    # Of two first starts at the same time, in one checkout, one waits here. The file is only something to lock.
    { exec 9>>"$root/pyproject.toml" && flock 9; } 2>/dev/null
    if ! is_ready "$@"; then
        if [ -z "$prefix" ]; then
            prefix=$root/.venv
            "$PY" -m venv "$prefix" ||
                fail "no virtual environment could be made in $prefix with $PY; install its venv package (python3-venv)"
            PY=$prefix/bin/python
        fi
        install_into "$prefix" "$@"
    fi
    { exec 9>&-; } 2>/dev/null
}
