#!/usr/bin/env bash
# Train:   [CONFIG_FILE=my.toml] [NGPU=8] bash run_train.sh [--section.key value ...]
#
#   CONFIG_FILE     a TOML file                              train_configs/debug.toml
#   NGPU            processes on this machine                the GPUs that torch sees, or 1 on CPU
#   LOG_RANK        ranks of this machine that print here    0 (comma-separated; the others write to files)
#   MAX_RESTARTS    how often all processes start again,     0
#                   from the newest checkpoint, if one dies
#                   of anything but an error that is named
#   NNODES          machines; start this on each of them     1
#   RDZV_ENDPOINT   host:port of one machine                 needed if NNODES > 1; MASTER_ADDR, MASTER_PORT do too
#   NODE_RANK       0 on the machine of RDZV_ENDPOINT        found by its name if unset
#   JOIN_TIMEOUT    seconds until all machines are there     600
#   RDZV_ID         a name that no other job there has       titan_fp8
#
# SIGTERM: the run saves a checkpoint after the step under way (on GPUs: after the next one), all machines stop, and this
# script exits with status 143: not 0, so that no scheduler takes the job for finished. The same command goes on from there. A
# file that appears at TITAN_FP8_STOP_FILE does the same. A second SIGTERM, SIGINT or SIGHUP: torchrun kills its processes
# after 30 s. tools/launch has examples for SLURM and Kubernetes.
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

nnodes=${NNODES:-1}
[[ $nnodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES must be a positive number, got $nnodes; leave it out for one machine"
endpoint=${RDZV_ENDPOINT:-${MASTER_ADDR:+$MASTER_ADDR:${MASTER_PORT:-29500}}}
if [ "$nnodes" -gt 1 ] && ! [[ $endpoint =~ ^.+:[0-9]+$ ]]; then
    fail "RDZV_ENDPOINT must be host:port of one machine if NNODES > 1, got ${endpoint:-nothing}; set it, the same on all machines"
fi
node=${NODE_RANK:-0}
if ! [[ $node =~ ^[0-9]+$ ]] || [ "$node" -ge "$nnodes" ]; then
    fail "NODE_RANK must be a number below NNODES ($nnodes), got $node; machines count from 0"
fi
patience=${JOIN_TIMEOUT:-600}
[[ $patience =~ ^[0-9]+$ ]] && [ "$patience" -ge 10 ] ||
    fail "JOIN_TIMEOUT must be a number of seconds, at least 10, got $patience; leave it out for 600"
restarts=${MAX_RESTARTS:-0}
[[ $restarts =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS must be a number, got $restarts; leave it out for none"

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
except (ValueError, AttributeError):  # not TOML, not UTF-8, or job = 3
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

# torchrun's --tee would put a pipe in place of the terminal; ranks that are shown keep the terminal instead.
redirects=()
for ((rank = 0; rank < ngpu; rank++)); do
    case ",$show," in
        *",$rank,"*) ;;
        *) redirects+=("$rank:3") ;;
    esac
done
logs=/dev/null # nothing to write, so no empty folders either
launch=(-m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "$ngpu" --max-restarts "$restarts")
launch+=(--rdzv-id "${RDZV_ID:-titan_fp8}")
[ "$nnodes" -gt 1 ] || endpoint=localhost:0
# Not the static rendezvous where NODE_RANK is known: it never learns that a process died on another machine.
launch+=(--rdzv-backend c10d --rdzv-endpoint "$endpoint")
if [ "$nnodes" -gt 1 ]; then
    conf=join_timeout=$patience,read_timeout=$patience
    if [ -n "${NODE_RANK:-}" ]; then
        conf+=,is_host=$([ "$node" = 0 ] && echo true || echo false)
    fi
    launch+=(--rdzv-conf "$conf")
fi
if [ "$restarts" -gt 0 ]; then
    # torchrun's own store, which processes use by default, outlives them: after a restart they would read in it the
    # addresses of the dead (pytorch issue 135712).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
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

# Beside the processes: the trainer's one-line error, so that it can be the last line, below torchrun's report; and the file
# by which a run is asked to stop, and in which it answers.
notes=$(mktemp -d)
trap 'rm -rf "$notes"' EXIT
export TITAN_FP8_ERROR_FILE=$notes/error TITAN_FP8_STOP_FILE=${TITAN_FP8_STOP_FILE:-$notes/stop}
: >"$TITAN_FP8_ERROR_FILE"
[ ! -s "$TITAN_FP8_STOP_FILE" ] || rm -f "$TITAN_FP8_STOP_FILE" # an earlier run's answer; an empty one asks

roll_call=""
if [ "$nnodes" -gt 1 ]; then
    "$PY" "$root/tools/roll_call.py" "$endpoint" "$nnodes" "${NODE_RANK:-}" "${RDZV_ID:-titan_fp8}" "$patience" \
        "$TITAN_FP8_ERROR_FILE" >/dev/null 2>&1 &
    roll_call=$!
fi

# In the background, so that a signal reaches us at once; torchrun then stops its processes.
"$PY" "${launch[@]}" "${given[@]}" <&0 &
child=$!
stopped=""
# shellcheck disable=SC2329 # traps call it
stop_now() {
    stopped=130
    kill -TERM "$child" 2>/dev/null
}
# shellcheck disable=SC2329 # traps call it
stop_soon() {
    if [ -n "$stopped" ]; then
        kill -TERM "$child" 2>/dev/null
        return
    fi
    stopped=143
    : >>"$TITAN_FP8_STOP_FILE"
    printf 'SIGTERM: a checkpoint is saved after this step; a second one stops at once.\n' >&2
}
trap stop_now INT HUP
trap stop_soon TERM
wait "$child"
status=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended only the wait
    wait "$child"
    status=$?
done
trap - INT TERM HUP
[ -z "$roll_call" ] || kill "$roll_call" 2>/dev/null

if [ -s "$TITAN_FP8_STOP_FILE" ]; then
    head -n 1 "$TITAN_FP8_STOP_FILE" >&2
    exit "${stopped:-143}"
fi
if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
    printf 'error: stopped by a signal; start again with the same command to go on from the last checkpoint\n' >&2
    exit "$stopped"
fi
if [ "$status" -ne 0 ]; then
    message=$(head -n 1 "$TITAN_FP8_ERROR_FILE")
    where="above"
    [ "$logs" = /dev/null ] || where="above or in $logs"
    printf 'error: %s\n' "${message:-training failed; the reason is $where}" >&2
fi
exit "$status"
