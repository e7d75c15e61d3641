#!/usr/bin/env bash
# Every check there is, GPU tests included where there is a GPU:   bash tests/run.sh [pytest arguments]
set -u -o pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tools/setup_env.sh
source "$root/tools/setup_env.sh"
setup_env dev
cd "$root" || exit 1
unset CI BUILD_NUMBER # pytest then shortens its output as it does for a person

failed=()
skipped=""
# The monitoring files are tested with the real programs; without them those tests are skipped.
if ! { command -v promtool && command -v prometheus && command -v prometheus-alertmanager; } >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        printf 'Installing prometheus and prometheus-alertmanager ...\n'
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq >/dev/null 2>&1
        apt-get install -y -qq --no-install-recommends prometheus prometheus-alertmanager >/dev/null 2>&1
    fi
    command -v promtool >/dev/null ||
        skipped="tests/monitoring with Prometheus and Alertmanager: not installed (apt-get install prometheus prometheus-alertmanager)"
fi

check() {
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
}
check "ruff check" "$PY" -m ruff check .
check "ruff format" "$PY" -m ruff format --check .
check "pyrefly" "$PY" -m pyrefly check titan_fp8 tools
# Two workers, for most of a test runs on one core (-n 0: none). A file stays with one: its tests share what its fixtures trained.
check "pytest" "$PY" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10 "$@"

if [ "${#failed[@]}" -gt 0 ]; then
    printf '\nFAILED: %s\n' "$(printf '%s, ' "${failed[@]}" | sed 's/, $//')"
    exit 1
fi
printf '\nAll checks passed.\n'
[ -z "$skipped" ] || printf 'SKIPPED: %s\n' "$skipped"
