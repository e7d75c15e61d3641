#!/usr/bin/env bash
# One run on several machines under SLURM, from the repository's folder, which all machines must see:
#
#   CONFIG_FILE=train_configs/fog_8b.toml sbatch tools/launch/slurm.sh [--section.key value ...]
#
# A process that dies: all start again from the newest checkpoint, MAX_RESTARTS times, without a new place in the queue.
# Time limit:          five minutes before it the run saves a checkpoint, stops, and goes back into the queue.
# Stop it:             scancel --batch --signal=TERM JOB     saves a checkpoint first; a plain scancel does not
#
# Preemption sends SIGTERM to every process: torchrun then gives 30 s to save (TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 from torch
# 2.12 on, at the price that a process that hangs is also given as long). PreemptParameters=send_user_signal in slurm.conf
# makes it like the time limit.
#
#SBATCH --job-name=titan_fp8
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -u -o pipefail
cd "$SLURM_SUBMIT_DIR" || exit 1
if [ ! -f run_train.sh ]; then
    printf 'error: sbatch must be called in the repository, got %s; go there and submit again\n' "$SLURM_SUBMIT_DIR" >&2
    exit 1
fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # SLURM_NODEID 0
export NNODES=$SLURM_JOB_NUM_NODES RDZV_ENDPOINT=$first:${MASTER_PORT:-29500} RDZV_ID=titan_fp8_$SLURM_JOB_ID
export MAX_RESTARTS=${MAX_RESTARTS:-3}

# The file asks run_train.sh's processes on all machines to stop. A signal to the job's steps would also reach torchrun.
export TITAN_FP8_STOP_FILE=$SLURM_SUBMIT_DIR/.stop-$SLURM_JOB_ID
rm -f "$TITAN_FP8_STOP_FILE" # left by an earlier run of this job
again=""
trap ': >>"$TITAN_FP8_STOP_FILE"' TERM
trap 'again=yes; : >>"$TITAN_FP8_STOP_FILE"' USR1

# shellcheck disable=SC2016 # each task has its own SLURM_NODEID
srun bash -c 'NODE_RANK=$SLURM_NODEID exec bash run_train.sh "$@"' run_train.sh "$@" &
child=$!
wait "$child"
status=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended only the wait
    wait "$child"
    status=$?
done
rm -f "$TITAN_FP8_STOP_FILE"
if [ -n "$again" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
