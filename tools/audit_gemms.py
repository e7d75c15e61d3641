"""List every GEMM of one training step: module, operator, operand dtypes, FLOPs, share.

    python tools/audit_gemms.py --config train_configs/debug.toml [--json] [--fp8.attention=off ...]

The model is built and run as training would, forward and backward, one sequence, on fake tensors: every operator is
dispatched with its real dtypes and shapes and computes nothing, so the 8B model takes seconds and no memory. Further
arguments override the TOML as in training. Exit status 1 if the TOML claims full FP8 (a recipe other than bf16, and
fp8.attention = "full") and a GEMM of a transformer block ran in something else; 2 on an error of the user's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from typing import Any

from titan_fp8 import device

device.install()

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from titan_fp8.config import load_config  # noqa: E402
from titan_fp8.errors import in_one_line  # noqa: E402
from titan_fp8.float8.audit import audit_step, summarize  # noqa: E402
from titan_fp8.float8.convert import convert  # noqa: E402
from titan_fp8.model.args import FLAVORS  # noqa: E402
from titan_fp8.model.decoder import Decoder  # noqa: E402
from titan_fp8.spec import build_tokenizer  # noqa: E402


def audit(config: Any) -> dict[str, Any]:
    """The report of `titan_fp8.float8.audit.summarize` for a loaded configuration."""
    build_tokenizer(config)
    args = FLAVORS[config.model.flavor]
    args.update_from_config(config)
    kind = device.device_kind()
    with FakeTensorMode(), torch.device(kind):
        model = Decoder(args)
        convert(model, config.fp8)
        tokens = torch.zeros(1, args.seq_len, dtype=torch.int64)
        with torch.autocast(kind, dtype=torch.bfloat16):
            gemms = audit_step(model.train(), tokens)
    return summarize(gemms)


def claims_full_fp8(config: Any) -> bool:
    return config.fp8.recipe != "bf16" and config.fp8.attention == "full"


def table(report: dict[str, Any]) -> str:
    """Equal calls in one line each: repetitions over layers are folded."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for gemm in report["gemms"]:
        module = ".".join("*" if part.isdigit() else part for part in gemm["module"].split("."))
        shapes = " x ".join(str(list(shape)) for shape in gemm["shapes"])
        groups[(module, gemm["phase"], gemm["op"], " x ".join(gemm["dtypes"]), shapes)].append(gemm)
    rows = [("module", "phase", "operator", "operands", "shapes", "calls", "GFLOP", "share")]
    for key, calls in groups.items():
        flops, share = sum(c["flops"] for c in calls), sum(c["share"] for c in calls)
        rows.append((*key, str(len(calls)), f"{flops / 1e9:,.2f}", f"{share:.1%}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


@in_one_line
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="TOML file")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    options, overrides = parser.parse_known_args()
    config = load_config(["--job.config_file", options.config, *overrides])
    report = audit(config)
    ratio = report["block_gemm_flops_fp8_ratio"]
    print(json.dumps(report) if options.json else table(report))
    if not options.json:
        print(
            f"\nFP8 share of GEMM FLOPs: {ratio:.1%} in the blocks, {report['gemm_flops_fp8_ratio']:.1%} of the step"
        )
    if claims_full_fp8(config) and ratio < 1.0:
        slow = sorted(
            {g["module"] for g in report["gemms"] if g["module"].startswith("layers.") and not g["fp8"]}
        )
        print(
            f"error: {options.config} claims full FP8, but {1 - ratio:.2%} of the blocks' GEMM FLOPs are not: {slow[0]}"
            f"{f' and {len(slow) - 1} more modules' if slow[1:] else ''}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
