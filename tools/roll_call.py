"""Who has joined: for run_train.sh, which starts it beside torchrun on every one of several machines.

    roll_call.py HOST:PORT NNODES NODE_RANK-or-empty RDZV_ID SECONDS ERROR_FILE

torchrun waits for machines in a store that the machine of HOST:PORT serves, and when its time is up does not say who was
missing. This writes the machine's name beside torchrun's keys, waits until all are there, and is silent; or it
writes into ERROR_FILE, as one line, who is missing. A machine that joins later, after a restart, finds the others' names.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from datetime import timedelta

if __name__ == "__main__":
    logging.disable(logging.WARNING)  # torch's, from its import on

import torch.distributed as dist

EARLY = 3.0  # seconds before torchrun gives up, and takes the store with it
REMEDY = "start run_train.sh there, look at its log, or set JOIN_TIMEOUT (seconds)"


def main(endpoint: str, nodes: int, rank: str, run: str, seconds: float) -> str:
    """What is wrong, or "" if all machines are there."""
    end = time.monotonic() + seconds
    host, _, port = endpoint.rpartition(":")
    where = f"RDZV_ENDPOINT {endpoint}"
    store = None
    while store is None:
        left = max(1.0, min(30.0, end - time.monotonic()))
        try:
            store = dist.TCPStore(
                host.strip("[]"), int(port), is_master=False, timeout=timedelta(seconds=left)
            )
        except (dist.DistError, RuntimeError, ValueError):
            if time.monotonic() >= end:
                return f"{where} must answer within {seconds:.0f} s, got no answer: NODE_RANK 0 is missing; {REMEDY}"
            time.sleep(1)
    prefix = f"titan_fp8/{run}"
    # Machines count from 0 by NODE_RANK; without it each takes the next free number, which names nobody.
    number = int(rank) if rank else nodes + store.add(f"{prefix}/unnamed", 1) - 1
    store.set(f"{prefix}/{number}", socket.gethostname())
    limit = 2 * nodes
    while True:
        present = [i for i in range(limit) if store.check([f"{prefix}/{i}"])]
        if len(present) >= nodes:
            return ""
        if time.monotonic() >= end:
            break
        time.sleep(1)
    names = ", ".join(
        f"{store.get(f'{prefix}/{i}').decode()}" + (f" (NODE_RANK {i})" if i < nodes else "") for i in present
    )
    missing = [str(i) for i in range(nodes) if i not in present]
    unnamed = any(i >= nodes for i in present)
    who = "set NODE_RANK to be told which" if unnamed else f"NODE_RANK {', '.join(missing)}"
    rule = f"{nodes} machines must join {where} within {seconds:.0f} s"
    return f"{rule}, got {len(present)}: {names}; missing: {who}; {REMEDY}"


if __name__ == "__main__":
    given, error_file = sys.argv[1:6], sys.argv[6]
    message = main(given[0], int(given[1]), given[2], given[3], float(given[4]) - EARLY)
    if message:
        with open(error_file, "a") as file:
            file.write(f"{message}\n")
