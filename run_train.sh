#!/usr/bin/env bash
# Train:   [CONFIG_FILE=my.toml] [NGPU=8] bash run_train.sh [--section.key value ...]
#
#   CONFIG_FILE     a TOML file                              train_configs/debug.toml
#   NGPU            processes on this machine                the GPUs that torch sees, or 1 on CPU
#   LOG_RANK        ranks of this machine that print here    0 (comma-separated; the others write to files)
#   NNODES          machines                                 1
#   RDZV_ENDPOINT   host:port of one machine                 needed if NNODES > 1
#   NODE_RANK       this machine's number, from 0            assigned at the rendezvous if unset
#
# The environment is found or made by tools/setup_env.sh. Everything after the name goes to titan_fp8.train;
# --help lists it.
set -u -o pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/setup_env.sh
source "$root/tools/setup_env.sh"

config=${CONFIG_FILE:-$root/train_configs/debug.toml}
for argument in "$@"; do
    case $argument in
        -h | --help) help=yes ;;
        --job.config_file | --job.config-file | --job.config_file=* | --job.config-file=*)
            fail "the configuration is named by CONFIG_FILE, got $argument; write CONFIG_FILE=my.toml bash run_train.sh" ;;
    esac
done
[ -f "$config" ] ||
    fail "CONFIG_FILE must be a TOML file, got $config; there are: $(cd "$root" && echo train_configs/*.toml)"

# shellcheck disable=SC2119 # our arguments are the trainer's
setup_env
given=(-m titan_fp8.train --job.config_file "$config" "$@")
if [ -n "${help:-}" ]; then
    exec "$PY" "${given[@]}"
fi

# Three facts from one start of Python: GPUs, cores, and the folder for logs.
facts=$(
    "$PY" - "$config" "${@}" <<'PYTHON'
import os, sys, tomllib, torch
try:
    with open(sys.argv[1], "rb") as file:
        dump = tomllib.load(file).get("job", {}).get("dump_folder", "./outputs")
except tomllib.TOMLDecodeError:
    dump = "./outputs"  # the trainer says what is wrong with the file
arguments = [part for argument in sys.argv[2:] for part in argument.split("=", 1)]
for name, value in zip(arguments, arguments[1:]):
    if name in ("--job.dump_folder", "--job.dump-folder"):
        dump = value
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
print(torch.cuda.device_count() if torch.cuda.is_available() else 0, cores, dump)
PYTHON
) || fail "torch could not be imported by $PY; see above, and mend or remove that environment"
read -r gpus cores dump <<<"$facts"

ngpu=${NGPU:-$((gpus > 0 ? gpus : 1))}
[[ $ngpu =~ ^[1-9][0-9]*$ ]] || fail "NGPU must be a positive number, got $ngpu; leave it out to use all GPUs"
if [ "$gpus" -gt 0 ] && [ "$ngpu" -gt "$gpus" ]; then
    fail "NGPU must be at most the number of GPUs that torch sees ($gpus), got $ngpu; lower it"
fi
show=${LOG_RANK:-0}
[[ $show =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "LOG_RANK must be ranks separated by commas, got $show; for example LOG_RANK=0,1"
nnodes=${NNODES:-1}
[[ $nnodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES must be a positive number, got $nnodes; leave it out for one machine"
if [ "$nnodes" -gt 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
    fail "RDZV_ENDPOINT must be set if NNODES > 1, got nothing; set it to host:port of one machine, on all machines"
fi

# torchrun's --tee would put a pipe in place of the terminal; ranks that are shown keep the terminal instead.
redirects=()
for ((rank = 0; rank < ngpu; rank++)); do
    case ",$show," in
        *",$rank,"*) ;;
        *) redirects+=("$rank:3") ;;
    esac
done
logs=/dev/null # nothing to write, so no empty folders either
launch=(-m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "$ngpu" --rdzv-id titan_fp8)
if [ -n "${NODE_RANK:-}" ] && [ "$nnodes" -gt 1 ]; then
    launch+=(--rdzv-backend static --node-rank "$NODE_RANK")
else
    launch+=(--rdzv-backend c10d)
fi
launch+=(--rdzv-endpoint "${RDZV_ENDPOINT:-localhost:0}")
if [ "${#redirects[@]}" -gt 0 ]; then
    logs=$dump/logs
    launch+=(--redirects "$(IFS=, && printf '%s' "${redirects[*]}")")
    printf 'Ranks other than %s write to %s.\n' "$show" "$logs" >&2
fi
launch+=(--log-dir "$logs")

threads=$((cores / ngpu > 0 ? cores / ngpu : 1))
if [ "$gpus" -gt 0 ] && [ "$threads" -gt 8 ]; then
    threads=8 # a GPU's process has little to compute on the CPU
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}

# The trainer's one-line error goes through this file, so that it can be the last line, below torchrun's report.
TITAN_FP8_ERROR_FILE=$(mktemp)
export TITAN_FP8_ERROR_FILE
trap 'rm -f "$TITAN_FP8_ERROR_FILE"' EXIT

# In the background, so that a signal reaches us at once; torchrun then stops its processes.
"$PY" "${launch[@]}" "${given[@]}" <&0 &
child=$!
stopped=""
trap 'stopped=yes; kill -TERM "$child" 2>/dev/null' INT TERM HUP
wait "$child"
status=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended only the wait
    wait "$child"
    status=$?
done
trap - INT TERM HUP

if [ -n "$stopped" ]; then
    printf 'error: stopped by a signal; start again with the same command to go on from the last checkpoint\n' >&2
    exit 130
fi
if [ "$status" -ne 0 ]; then
    message=$(head -n 1 "$TITAN_FP8_ERROR_FILE")
    where="above"
    [ "$logs" = /dev/null ] || where="above or in $logs"
    printf 'error: %s\n' "${message:-training failed; the reason is $where}" >&2
fi
exit "$status"
