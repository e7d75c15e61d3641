"""run_train.sh on two machines (two torchrun agents here), and the examples of tools/launch as far as no cluster is needed.

The run on two machines takes about a minute; alone: pytest -m launch, the others: pytest -m "not launch".
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "tools" / "launch"
SCRIPTS = ["run_train.sh", "tests/run.sh", "tools/setup_env.sh", "tools/launch/slurm.sh"]
LAUNCHERS_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if shutil.which("shellcheck", path=path) is None:
        pytest.skip("needs shellcheck: pip install -e .[dev]")
    command = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", script]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kubernetes_example():
    """Valid by Kubernetes' own schemas (unknown keys refused), and of one mind about names and numbers."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install -e .[dev]").validate
    import yaml

    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    for document in (service, job):
        validate(document, "1.32", strict=True)
    spec, name = job["spec"], job["metadata"]["name"]
    (container,) = spec["template"]["spec"]["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(env["NNODES"])
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
    assert (
        env["RDZV_ENDPOINT"]
        == f"{name}-0.{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    )
    assert (ROOT / env["CONFIG_FILE"]).is_file()
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [143]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in spec["template"]["spec"]["volumes"]
    }


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_example(tmp_path, number, requeued):
    """Against stand-ins for srun, scontrol and run_train.sh: what every machine is told, and what a signal does."""
    stand_ins = {
        "bin/srun": 'for id in 0 1; do SLURM_NODEID=$id "$@" & pids+=($!); done\n'
        'for pid in "${pids[@]}"; do wait "$pid" || status=$?; done; exit "${status:-0}"',
        "bin/scontrol": '[ "$1" = show ] && printf "host%s\\n" 7 8 || echo "$@" >>scontrol.txt',
        "run_train.sh": 'echo "$NODE_RANK/$NNODES $RDZV_ENDPOINT $RDZV_ID $MAX_RESTARTS $*" >>told.txt\n'
        'for _ in {1..200}; do [ -e "$TITAN_FP8_STOP_FILE" ] && exit 143; sleep 0.05; done',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "host[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "55",
    }  # fmt: skip
    (tmp_path / ".stop-55").touch()  # of an earlier run of this job
    job = subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sh"), "--training.steps=5", "a b"], cwd=tmp_path, env=env
    )
    told = tmp_path / "told.txt"
    wait_for(lambda: told.exists() and len(told.read_text().splitlines()) == 2, job, seconds=10)
    job.send_signal(number)
    assert job.wait(timeout=10) == 143
    expected = [f"{node}/2 host7:29500 titan_fp8_55 3 --training.steps=5 a b" for node in (0, 1)]
    assert sorted(told.read_text().splitlines()) == expected
    assert (tmp_path / "scontrol.txt").exists() is requeued
    assert not (tmp_path / ".stop-55").exists()


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"NNODES": "2"}, "RDZV_ENDPOINT must be host:port of one machine if NNODES > 1, got nothing"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "host"}, "got host;"),
        (
            {"NNODES": "2", "MASTER_ADDR": "host", "NODE_RANK": "2"},
            "NODE_RANK must be a number below NNODES (2), got 2",
        ),
        ({"JOIN_TIMEOUT": "2"}, "JOIN_TIMEOUT must be a number of seconds, at least 10, got 2"),
        ({"MAX_RESTARTS": "often"}, "MAX_RESTARTS must be a number, got often"),
    ],
)
def test_wrong_numbers_are_one_line(tmp_path, env, expected):
    command = ["bash", str(ROOT / "run_train.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(**env), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and expected in line


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_machine_that_never_joins_is_named(tmp_path):
    """In the last line, after torchrun has given up."""
    port = free_port()
    env = environment(
        NNODES="2", NODE_RANK="0", RDZV_ENDPOINT=f"127.0.0.1:{port}", JOIN_TIMEOUT="12", NGPU="1"
    )
    command = ["bash", str(ROOT / "run_train.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: 2 machines must join RDZV_ENDPOINT 127.0.0.1:{port} within")
    assert f"got 1: {socket.gethostname()} (NODE_RANK 0); missing: NODE_RANK 1;" in last


def test_the_roll_call(monkeypatch):
    """Silent when all are there, whether they know their rank or not; names the machine that should answer if none does."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    roll_call = importlib.import_module("roll_call")
    port = free_port()
    message = roll_call.main(f"127.0.0.1:{port}", 2, "1", "run", 0.5)
    assert "got no answer: NODE_RANK 0 is missing" in message
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for ranks in (("0", "1", "2"), ("", "", "")):
        run = f"run {ranks[0]}"
        messages = []
        threads = [
            threading.Thread(
                target=lambda rank=rank, run=run, messages=messages: messages.append(
                    roll_call.main(f"127.0.0.1:{port}", 3, rank, run, 10)
                )
            )
            for rank in ranks
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert messages == [""] * 3
        # A machine that starts again finds the others' names.
        assert roll_call.main(f"127.0.0.1:{port}", 3, ranks[1], run, 10) == ""
    message = roll_call.main(f"127.0.0.1:{port}", 3, "2", "other run", 0.5)
    assert f"got 1: {socket.gethostname()} (NODE_RANK 2); missing: NODE_RANK 0, 1;" in message
    del store


# ---- Two machines ----

FLAGS = (
    "--training.steps=24", "--checkpoint.interval=4", "--architecture.n_layers=1", "--training.seq_len=32",
    "--training.local_batch_size=4", "--metrics.log_freq=1", "--metrics.enable_tensorboard=false",
    "--validation.enable=false", "--prometheus.enable=false",
)  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHERS_VARIABLES}
    if sys.prefix != sys.base_prefix:
        env["VIRTUAL_ENV"] = sys.prefix
    return env | {"OMP_NUM_THREADS": "1"} | more


def wait_for(condition: Callable[[], object], process: subprocess.Popen, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, f"ended or too slow: {process.args}"
        time.sleep(0.05)


class Machines:
    """Agents in one folder, two processes in all: on two machines, which meet at machine 0, or on one."""

    def __init__(self, folder: Path, count: int = 2):
        folder.mkdir(exist_ok=True)
        port = free_port()
        self.folder = folder
        self.agents = []
        for node in range(count):
            env = environment(NGPU=str(2 // count), MAX_RESTARTS="2")
            if count > 1:
                env |= {"NNODES": "2", "NODE_RANK": str(node), "RDZV_ENDPOINT": f"127.0.0.1:{port}"}
            with open(folder / f"machine{node}.txt", "ab") as out:
                command = ["bash", str(ROOT / "run_train.sh"), *FLAGS]
                self.agents.append(
                    subprocess.Popen(
                        command, cwd=folder, env=env, stdout=out, stderr=out, start_new_session=True
                    )
                )

    def console(self, node: int) -> str:
        return (self.folder / f"machine{node}.txt").read_text(errors="replace")

    def losses(self) -> dict[int, tuple[float, float]]:
        try:
            lines = (self.folder / "outputs/debug/metrics.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return {}
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "train"}

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: max(self.losses(), default=0) >= step, self.agents[0], seconds=240)

    def pid_of_rank(self, rank: int) -> int:
        """The trainer's process, by its environment and its working folder."""
        for entry in Path("/proc").iterdir():
            try:
                if (
                    f"RANK={rank}" in (entry / "environ").read_text().split("\0")
                    and (entry / "cwd").resolve() == self.folder.resolve()
                ):
                    return int(entry.name)
            except (OSError, UnicodeDecodeError):
                continue
        raise AssertionError(f"no process of rank {rank}")

    def wait(self) -> list[int]:
        return [agent.wait(timeout=240) for agent in self.agents]

    def end(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                agent.terminate()  # twice: at once
                agent.terminate()
                agent.wait(timeout=60)


@pytest.mark.launch
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_two_machines_lose_a_process_are_stopped_and_go_on(tmp_path):
    """SIGKILL to a trainer, then SIGTERM to one machine, then the same commands: in the end the same, bit for bit, as one
    machine that nobody disturbed."""
    whole, broken = Machines(tmp_path / "whole", count=1), Machines(tmp_path / "broken")
    again = None
    try:
        broken.wait_for_step(6)
        os.kill(broken.pid_of_rank(1), signal.SIGKILL)
        before = broken.console(0) + broken.console(1)
        wait_for(
            lambda: (broken.console(0) + broken.console(1)).count("Loading the checkpoint"),
            broken.agents[0],
            seconds=240,
        )
        assert "Loading the checkpoint" not in before
        broken.wait_for_step(max(broken.losses()) + 2)
        broken.agents[1].send_signal(signal.SIGTERM)  # one machine of the two
        assert broken.wait() == [143, 143], broken.console(0)[-3000:]
        stopped = max(broken.losses())
        assert 6 < stopped < 24
        for node in (0, 1):
            last = broken.console(node).splitlines()[-1]
            assert last.startswith(f"stopped as asked after step {stopped}, with a checkpoint of it"), last
        assert (tmp_path / f"broken/outputs/debug/checkpoint/step-{stopped}/.metadata").is_file()
        again = Machines(tmp_path / "broken")
        assert again.wait() == [0, 0], again.console(0)[-3000:]
        assert f"Training starts at step {stopped + 1}" in again.console(0) + again.console(1)
        assert whole.wait() == [0], whole.console(0)[-3000:]
        assert list(whole.losses()) == list(again.losses()) == list(range(1, 25))
        assert whole.losses() == again.losses()
    finally:
        for machines in filter(None, (whole, broken, again)):
            machines.end()
