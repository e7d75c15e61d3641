#!/usr/bin/env python3
"""Evaluate with lm-eval what a study has trained, on the tasks that build_tasks.py makes of a held-out file.

    python tools/downstream/evaluate.py studies/quality_50m.toml --path english.val.jsonl.xz [--arms "a,b"] [--seeds 1,2]

Of every run of tools/study.py that has ended and has its last checkpoint here, the model is exported (tools/export_hf.py, in
bfloat16) and read by lm-eval without FP8, on a GPU where there is one. Its figures go to the study's folder,
downstream/ARM-SEED.json, and from there into the report; a run that has them is left out. Needs `pip install -e .[eval]`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TOOLS.parent), str(TOOLS), str(TOOLS / "downstream")]

import build_tasks  # noqa: E402  # pyrefly: ignore
import study  # noqa: E402

from titan_fp8 import checkpoint_folder  # noqa: E402
from titan_fp8.errors import UserError, in_one_line  # noqa: E402
from titan_fp8.files import save  # noqa: E402


def checkpoint_of(run: study.Run) -> Path | None:
    """The checkpoint that a run ended with, if it lies here."""
    outcome = run.outcome() if run.ended() else None
    folder = run.folder / "checkpoint"
    if outcome is None or outcome["step"] not in checkpoint_folder.complete_steps(folder):
        return None
    return folder / f"step-{outcome['step']}"


def export(run: study.Run, config: Path, checkpoint: Path, out: Path) -> None:
    """A process of its own: torchtitan's devices and transformers' need not meet."""
    command = [sys.executable, str(TOOLS / "export_hf.py"), "--config", str(config)]
    command += ["--checkpoint", str(checkpoint), "--out", str(out), *run.arguments]
    done = subprocess.run(command, cwd=TOOLS.parent, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{run.name} cannot be exported: {(done.stderr.strip() or 'no reason').splitlines()[-1]}"
        )


def figures(results: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Of lm-eval's results, what is kept: of the cloze task, and bits per byte by domain and as the domains' mean."""
    group = f"{name}_bits_per_byte"
    found: dict[str, Any] = {
        "bits_per_byte": {
            task.removeprefix(group).lstrip("_") or "mean": values["bits_per_byte,none"]
            for task, values in results.items()
            if task.startswith(group)
        }
    }
    if cloze := results.get(f"{name}_cloze"):
        found["cloze"] = {key: cloze[f"{key},none"] for key in ("acc", "acc_stderr", "perplexity")}
    return found


def evaluate(model: Path, tasks: Path, name: str) -> dict[str, Any]:
    """`figures` of the exported model in the folder `model` on the folder `tasks` of build_tasks.py."""
    import lm_eval  # pyrefly: ignore
    import torch
    from lm_eval.tasks import TaskManager  # pyrefly: ignore

    names = [f"{name}_bits_per_byte", *([f"{name}_cloze"] if (tasks / f"{name}_cloze.yaml").exists() else [])]
    settings = {
        "pretrained": str(model),
        "dtype": "bfloat16",
        "add_bos_token": False,
        "softmax_dtype": "float32",
    }
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=settings | {"trust_remote_code": (model / "modeling_fog.py").exists()},  # it is ours
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=16,
    )
    return figures(found["results"], name)


@in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, metavar="STUDY.toml")
    parser.add_argument("--path", type=Path, required=True, help="held-out documents, JSON lines")
    parser.add_argument("--arms", help="names with commas; default all")
    parser.add_argument("--seeds", help="numbers with commas; default all")
    options = parser.parse_args(argv)
    chosen = study.load(options.study.resolve())
    runs = study.choose(chosen, options.arms, options.seeds)
    there = {run.name: path for run in runs if (path := checkpoint_of(run)) is not None}
    if not there:
        raise UserError(
            f"{options.study} must have a run that ended and whose last checkpoint is here, got none in "
            f"{chosen.folder / 'runs'}: python tools/study.py run {options.study}"
        )
    out = {run.name: chosen.folder / "downstream" / f"{run.name}.json" for run in runs}
    waiting = [run for run in runs if run.name in there and not out[run.name].exists()]
    for run in runs:
        if run not in waiting:
            print(f"{run.name}: {'done before' if out[run.name].exists() else 'no last checkpoint here'}")
    if not waiting:
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for key in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
            os.environ[key] = str(folder / key.lower())  # nothing of it is of use later
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            import lm_eval  # noqa: F401  # pyrefly: ignore
        except ImportError as error:
            raise UserError(f"lm-eval must be installed, got {error}: pip install -e .[eval]") from error
        limits = build_tasks.COUNT, build_tasks.DOMAIN_BYTES
        build_tasks.build(options.path, folder / "tasks" / "held_out", "held_out", *limits)
        for run in waiting:
            export(run, chosen.config, there[run.name], folder / run.name)
            with contextlib.redirect_stdout(sys.stderr):
                found = evaluate(folder / run.name, folder / "tasks" / "held_out", "held_out")
            found |= {"held_out": options.path.name, "lm_eval": version("lm_eval")}
            out[run.name].parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(found, indent=1) + "\n"
            save(out[run.name], lambda path, text=text: path.write_text(text))
            accuracy = f", cloze {100 * found['cloze']['acc']:.1f} %" if "cloze" in found else ""
            print(f"{run.name}: {found['bits_per_byte']['mean']:.4f} bits per byte{accuracy}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
