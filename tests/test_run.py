"""`bash run_train.sh` as a stranger runs it: the debug configuration, whole; killed and resumed; on two processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def environment(**more: str) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if sys.prefix != sys.base_prefix:
        env["VIRTUAL_ENV"] = sys.prefix
    # One thread each: the runs below share two cores, and bit-equality needs equal thread counts.
    return env | {"OMP_NUM_THREADS": "1"} | more


def start(folder: Path, *flags: str, **env: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    out = open(folder / "console.txt", "ab")  # noqa: SIM115 - the child's, closed with the process
    return subprocess.Popen(
        ["bash", str(ROOT / "run_train.sh"), *flags],
        cwd=folder, env=environment(**env), stdout=out, stderr=out, start_new_session=True,
    )  # fmt: skip


def console(folder: Path) -> str:
    return (folder / "console.txt").read_text(errors="replace")


def rows(folder: Path, kind: str) -> dict[int, dict]:
    lines = (folder / "outputs/debug/metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if row["kind"] == kind}


def newest_step(folder: Path) -> int:
    try:
        return max(rows(folder, "train"), default=0)
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Two runs of the debug configuration side by side: one uninterrupted, one killed with SIGKILL and started again."""
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    first, second = start(whole), start(killed)
    deadline = time.monotonic() + 900
    while newest_step(killed) < 110 and second.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    port = re.search(r"http://127\.0\.0\.1:(\d+)/metrics", console(killed))
    assert port, console(killed)[-3000:]
    scrape = urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/metrics", timeout=10).read().decode()
    (killed / "scrape.txt").write_text(scrape)
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    (killed / "rows_before.txt").write_text(str(newest_step(killed)))
    again = start(killed)
    for process in (first, again):
        process.wait(timeout=max(1, deadline - time.monotonic()))
    assert first.returncode == 0, console(whole)[-3000:]
    assert again.returncode == 0, console(killed)[-3000:]
    return {"whole": whole, "killed": killed}


def test_the_loss_falls_far_below_unigram_entropy(runs):
    train, run = rows(runs["whole"], "train"), rows(runs["whole"], "run")
    assert max(train) == 200
    entropy = run[0]["unigram_entropy"]
    last = [row["loss"] for step, row in train.items() if step > 180]
    assert sum(last) / len(last) < entropy - 0.8
    assert rows(runs["whole"], "validation")[200]["validation_loss"] < entropy - 0.6


def test_the_end_says_what_happened_and_where_things_lie(runs):
    text = console(runs["whole"])
    for line in (
        r"Loss: 5\.\d+ at step 1, \d\.\d+ at step 200",
        r"Token frequencies alone would give a loss of \d\.\d+",
        r"Bits per byte: ",
        r"Speed: [\d,]+ tokens/s",
        r"Metrics: outputs/debug/metrics\.jsonl",
        r"Checkpoints: outputs/debug/checkpoint",
        r"Logs: ",
        r"Try next: ",
        r"converted 24 of 24 linears",
        r"size: 625,672 total parameters",
    ):
        assert re.search(line, text), line
    folder = runs["whole"] / "outputs/debug"
    assert sorted(os.listdir(folder / "checkpoint")) == ["step-100", "step-150", "step-200"]
    assert list((folder / "tb").rglob("events*"))
    assert (folder / "logs/rank0.log").stat().st_size > 1000


def test_kill_and_resume_gives_the_same_run_bit_for_bit(runs):
    """Also: two runs at one seed are equal. Compared: all logged steps, validations, the last checkpoint's tensors."""
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    assert 110 <= int((runs["killed"] / "rows_before.txt").read_text()) < 200
    assert "Loading the checkpoint" in console(runs["killed"])
    for kind in ("train", "validation"):
        whole, killed = rows(runs["whole"], kind), rows(runs["killed"], kind)
        assert list(whole) == list(killed)
        keys = ("loss", "grad_norm", "bits_per_byte", "fp8", "tokens", "validation_loss")
        for step in whole:
            assert [whole[step].get(k) for k in keys] == [killed[step].get(k) for k in keys], (
                f"{kind} step {step}"
            )
    states = [
        _load_state_dict_from_keys(checkpoint_id=str(folder / "outputs/debug/checkpoint/step-200"))
        for folder in (runs["whole"], runs["killed"])
    ]
    compared = 0
    for name, tensor in _flat(states[0]):
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, dict(_flat(states[1]))[name]), name
            compared += 1
    assert compared > 100


def _flat(state: dict, prefix: str = ""):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_prometheus_shows_a_running_job(runs):
    scrape = (runs["killed"] / "scrape.txt").read_text()
    for metric in (
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens_total",
        "step_seconds",
        "memory_reserved_peak_bytes",
    ):
        assert re.search(rf"^titan_fp8_{metric} [\d.e+-]+$", scrape, re.M), metric
    assert re.search(r"^titan_fp8_fp8_max_saturation_ratio [\d.e+-]+$", scrape, re.M)


def test_a_second_start_of_a_finished_run_says_what_to_do(runs):
    process = start(runs["whole"])
    assert process.wait(timeout=120) != 0
    last = console(runs["whole"]).strip().splitlines()[-1]
    assert last.startswith(
        "error: ./outputs/debug holds a finished run, step 200 of 200: train on with --training.steps=400"
    )


def test_plot_draws_the_run(runs, tmp_path):
    picture = tmp_path / "run.png"
    command = [
        sys.executable,
        "tools/plot_run.py",
        str(runs["whole"] / "outputs/debug"),
        "--out",
        str(picture),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 20_000


def test_two_processes_train_as_one(tmp_path):
    """FSDP2 over gloo: equal losses to bf16 rounding of the reduced gradients, and the FP8 state is shared."""
    flags = ("--training.steps=6", "--architecture.n_layers=2", "--training.seq_len=64", "--metrics.log_freq=1",
             "--validation.enable=false", "--checkpoint.enable=false", "--training.global_batch_size=8",
             "--training.local_batch_size=4", "--prometheus.enable=false")  # fmt: skip
    one, two = start(tmp_path / "one", *flags), start(tmp_path / "two", *flags, NGPU="2")
    assert one.wait(timeout=240) == 0, console(tmp_path / "one")[-3000:]
    assert two.wait(timeout=240) == 0, console(tmp_path / "two")[-3000:]
    a, b = (rows(tmp_path / name, "train") for name in ("one", "two"))
    assert [row["tokens"] for row in a.values()] == [row["tokens"] for row in b.values()]
    for step in a:
        assert a[step]["loss"] == pytest.approx(b[step]["loss"], rel=5e-3), step


@pytest.mark.parametrize(
    ("flags", "file", "expected"),
    [
        (("--training.stpes=3",), b"", "training.steps"),
        (("--data.source=files", "--data.path=/nowhere"), b"", "/nowhere"),
        ((), "# caf\u00e9\n".encode("latin-1"), "must be UTF-8"),
        ((), b"job = 3\n", "job must be a section"),
    ],
)
def test_an_error_is_one_line_and_the_last(tmp_path, flags, file, expected):
    """The answer that an earlier run left in its stop file is not this one's."""
    env = {"TITAN_FP8_STOP_FILE": str(tmp_path / "stop")}
    (tmp_path / "stop").write_text("stopped as asked after step 7\n")
    if file:
        env["CONFIG_FILE"] = str(tmp_path / "my.toml")
        (tmp_path / "my.toml").write_bytes(file)
    process = start(tmp_path, *flags, **env)
    assert process.wait(timeout=120) != 0
    last = console(tmp_path).strip().splitlines()[-1]
    assert last.startswith("error: ") and expected in last


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    joined = [re.sub(r"\\\n\s+", "", block) for block in blocks]
    lines = [line.split("  #")[0].strip() for block in joined for line in block.splitlines()]
    return [line for line in lines if line]


# What is added to a command so that a test can wait for it, or why it is not run here.
ADDED = {
    "bash run_train.sh": None,  # the fixture `runs` ran exactly this
    "bash tests/run.sh": None,  # this test runs inside it; .ci/run calls it (below)
    "python tools/plot_run.py outputs/debug": "",
    "python tools/audit_gemms.py --config train_configs/debug.toml": "",
    "python -m titan_fp8.train --help": "",
    "CONFIG_FILE=train_configs/fog_390m.toml bash run_train.sh --training.steps=20": "gpu",
    "python tools/prepare_data.py --path my_text --out shards --tokenizer byte": "",
    "bash run_train.sh --data.source=shards --data.path=shards --job.dump_folder=outputs/mine": " --training.steps=3",
    "python tools/plan.py train_configs/fog_8b.toml --gpus 256 --tp 2": "",
    "NNODES=2 RDZV_ENDPOINT=node0:29500 MAX_RESTARTS=3 bash run_train.sh": None,  # test_launch.py, two at once
    "python tools/export_hf.py --config train_configs/debug.toml --checkpoint outputs/debug/checkpoint/step-200 --out exported": "",  # noqa: E501
    'python tools/benchmark.py --model 8b-slice --rounds 5 --steps 5 --variants "torchtitan bf16,torchao tensorwise,'
    'llama fp8 linears,fog_max fp8 full + adam16,fog_max fp8 full + head + adam"': None,  # minutes of an H200
    "python tools/downstream/build_tasks.py --path english.val.jsonl.xz --out tasks/english": None,  # test_build_tasks.py,
    "lm_eval --model hf --model_args pretrained=exported,trust_remote_code=True,add_bos_token=False,"
    "softmax_dtype=float32 --include_path tasks --tasks english_cloze,english_bits_per_byte": None,  # where lm-eval is
    "lm_eval --model hf --model_args pretrained=exported,trust_remote_code=True --include_path tools/downstream "
    "--tasks fog_paper": None,  # needs the hub
    "python tools/study.py run studies/quality_50m.toml": None,  # GPU hours; tests/tools/test_study.py runs a small one
    "python tools/study.py report studies/*.toml --out STUDY.md": None,  # writes into the checkout; the same
    "docker compose -f tools/monitoring/compose.yaml up -d": None,  # its files are held by tests/monitoring
    "python tools/monitoring/replay.py outputs/debug": None,  # goes on until Ctrl-C: tests/monitoring/test_replay.py
}


def test_every_command_of_the_readme_works(runs):
    assert readme_commands() == list(ADDED), (
        "README.md and this table name the same commands, in the same order"
    )
    assert "bash tests/run.sh" in (ROOT / ".ci/run").read_text()
    folder = runs["whole"]
    for name in ("tools", "train_configs", "run_train.sh"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    (folder / "my_text").mkdir(exist_ok=True)
    for i in range(200):
        (folder / "my_text" / f"{i}.txt").write_text(
            f"Document {i}. " + "It was a dark and stormy night. " * 30
        )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, added in ADDED.items():
        if added is None:
            continue
        if added == "gpu":
            if torch.cuda.is_available():
                added = ""
            else:  # what this machine can run of it: the configuration, the model and every GEMM of a step
                command, added = "python tools/audit_gemms.py --config train_configs/fog_390m.toml", ""
        done = subprocess.run(
            command + added, shell=True, cwd=folder, env=environment(PATH=path, PYTHONPATH=str(ROOT)),
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
