"""A training run goes bad, Prometheus scrapes it, and Alertmanager delivers the alert before the loss leaves its baseline.

A Llama of two layers whose learning rate grows without end; every step is logged. Rules run in haste (servers.HASTE). Seed
and rate are chosen so that the run goes bad on any CPU: the alert's way is tried here, the predictor elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from recordings import bad_row
from servers import free_port, program, wait_for

FLAGS = {
    "job.config_file": "train_configs/debug.toml", "architecture.preset": "llama", "architecture.n_layers": 2,
    "training.seq_len": 32, "training.local_batch_size": 8, "training.steps": 200, "training.max_norm": 1e6,
    "optimizer.lr": 2.0, "debug.seed": 1, "lr_scheduler.warmup_steps": 300, "metrics.log_freq": 1,
    "validation.enable": "false", "checkpoint.enable": "false", "metrics.enable_tensorboard": "false",
    "prometheus.next_free_port": "false",
}  # fmt: skip

# Real steps take minutes, these milliseconds. So that what Prometheus sees does not depend on how fast this machine is, the
# run waits in step 15 until Prometheus is there, and up to step 50 each takes half a second, longer than some scrapes.
PACED = """
import os, sys, time
from titan_fp8 import train
step = train.Trainer.train_step
def paced(self, data):
    step(self, data)
    while self.step == 15 and not os.path.exists(os.environ["GO"]):
        time.sleep(0.1)
    time.sleep(0.5 if 15 <= self.step < 50 else 0)
train.Trainer.train_step = paced
sys.exit(train.main())
"""


def test_a_training_run_goes_bad(monitoring, pytestconfig, tmp_path, capsys):
    program("prometheus"), program("prometheus-alertmanager")
    port = free_port()
    flags = FLAGS | {"prometheus.port": port, "job.dump_folder": tmp_path}
    env = os.environ | {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(pytestconfig.rootpath),
        "GO": str(tmp_path / "go"),
    }  # fmt: skip
    command = [sys.executable, "-c", PACED, *(f"--{key}={value}" for key, value in flags.items())]
    with open(tmp_path / "console.txt", "wb") as out:
        training = subprocess.Popen(command, env=env, cwd=pytestconfig.rootpath, stdout=out, stderr=out)
        try:
            found = monitoring(f"127.0.0.1:{port}")
            (tmp_path / "go").touch()
            assert training.wait(timeout=240) == 0, (tmp_path / "console.txt").read_text()[-3000:]
        finally:
            training.kill()
            training.wait()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    off = rows[bad_row(rows)]["step"]
    told = wait_for(lambda: found.webhook.first("TitanFp8DivergencePredicted"), 5, "the alert")
    assert told[1]["labels"]["instance"] == f"127.0.0.1:{port}"
    (steps,) = found.query("titan_fp8_steps_total", at=told[0])
    at = int(float(steps["value"][1]))
    with capsys.disabled():
        print(f"\n  alert delivered at step {at}; loss off its baseline at {off} of {rows[-1]['step']}")
    assert 20 < at < off
