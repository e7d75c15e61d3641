"""The walls of DESIGN.md, "Who may know whom": read from the imports, like a spelling check.

A module that is not in the tables below may know its own package, `config` and `errors`, but not torchtitan.
Imports under `if TYPE_CHECKING` do not count: they are gone when the program runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "titan_fp8"


class Import(NamedTuple):
    """One name that a module imports; `titan_fp8.` is left out, `inside` a function or at the top."""

    target: str
    inside: bool
    line: int


# Who may import what of ours (patterns, without "titan_fp8."); everything may import errors.
OURS = {
    "errors": [],
    "config": [],
    "device": [],
    "checkpoint_folder": [],
    "files": [],
    "checkpoint": ["checkpoint_folder", "files"],
    "tensor_parallel": [],  # neutral ground: what ranks send each other, in the decoder and in FP8 layers
    "probe": [
        "float8.kernels.moments"
    ],  # neutral ground: where the decoder and FP8 layers let themselves be looked at, by whom they do not know
    "loss": ["tensor_parallel"],  # neutral ground: the decoder's loss, which float8.head computes in FP8
    "optim": ["float8.kernels.adam", "float8.formats"],
    "model.activations": ["tensor_parallel"],
    "model.decoder": ["model.activations", "model.args", "loss", "probe", "tensor_parallel"],
    "model.parallelize": ["float8.kernels.attention", "device", "tensor_parallel"],
    "float8.formats": [],
    "float8.kernels.*": ["float8.formats", "float8.kernels*"],
    "float8.scaling": ["float8.formats", "float8.kernels.moments", "probe", "tensor_parallel"],
    "float8.weights": ["float8.formats", "float8.kernels.cast"],
    "float8.linear": [
        "float8.kernels*",
        "float8.scaling",
        "float8.formats",
        "float8.weights",
        "tensor_parallel",
    ],
    "float8.feed_forward": [
        "float8.kernels*",
        "float8.scaling",
        "float8.formats",
        "float8.linear",
        "tensor_parallel",
    ],
    "float8.head": ["loss", "float8.kernels*", "float8.scaling", "float8.formats", "tensor_parallel"],
    "float8.attention": ["float8.kernels*", "float8.scaling", "float8.formats"],
    "float8.torchao_linear": ["tensor_parallel"],
    "float8.convert": ["float8.*", "config"],
    "stability.statistics": ["float8.kernels.cosines", "float8.kernels.moments", "probe"],
    "stability.predictor": [],
    "stability.policy": [],
    "stability.gate": [],
    "stability.endpoint": [],
    "stability.exporter": ["stability.endpoint"],
    "stability.processor": ["stability.*", "config"],
    "validate": ["data.*", "config"],
    "respond": ["stability.policy", "stability.gate", "checkpoint_folder"],
    "spec": ["*"],
    "train": ["*"],
}

# Walls that deserve their own words. (who, must not import, why)
NEVER = [
    (
        "model.decoder",
        "titan_fp8.float8*",
        "the decoder has plain nn.Linear and inner_attention; convert swaps them",
    ),
    ("float8.*", "titan_fp8.model*", "FP8 layers serve any model: convert finds them by name and type"),
    (
        "float8.kernels.*",
        "torch.nn",
        "kernels are functions of tensors; modules are built in linear and attention",
    ),
    (
        "float8.*",
        "titan_fp8.stability*",
        "layers do not know that they are watched: statistics come from hooks",
    ),
    (
        "model.*",
        "titan_fp8.stability*",
        "layers do not know that they are watched: statistics come from hooks",
    ),
    (
        "stability.predictor",
        "torch",
        "the predictor reads rows of numbers, so it also runs on logs, without a GPU",
    ),
    (
        "stability.policy",
        "torch",
        "a policy decides from numbers: respond carries out, through the trainer's parts",
    ),
    ("stability.predictor", "prometheus_client", "the predictor predicts; the exporter tells"),
    ("stability.exporter", "titan_fp8.model*", "the exporter knows names, units and numbers, and no model"),
    (
        "stability.exporter",
        "torch",
        "the exporter gets numbers: whoever holds the tensors decides when to look",
    ),
    ("checkpoint_folder", "torch", "tools that look for checkpoints must start at once"),
    (
        "*",
        "titan_fp8.train",
        "train is the entry point: what others need from it belongs in a module of its own",
    ),
]

# Who may import torchtitan: leaving 0.2.2 one day means rewriting these modules only.
TORCHTITAN = [
    *("device", "checkpoint", "train", "validate", "spec", "model.parallelize", "model.args", "model.hf"),
    *("float8.convert", "data.dataset", "data.tokenizer", "stability.processor"),
]
TORCHTITAN_INSIDE_FUNCTIONS = [
    "config"
]  # a configuration must be readable without the 9 s that torchtitan takes
TORCHTITAN_NAMES = {"model.decoder": ["BaseModelArgs", "ModelProtocol"]}

MODULES = {
    ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """What `source` imports, relative names resolved, `from a import b` as "a.b"."""

    def walk(node: ast.AST, inside: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, inside, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *module.split(".")]
                above = here[: len(here) - node.level + is_package]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", inside, node.lineno)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield from walk(child, inside)
        else:
            inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            for child in ast.iter_child_nodes(node):
                yield from walk(child, inside)

    return walk(ast.parse(source), False)


def below(target: str, pattern: str) -> bool:
    """Whether an imported name is `pattern` or something in it."""
    return fnmatch(target, pattern) or fnmatch(target, f"{pattern}.*")


def own_module(target: str) -> str | None:
    """The module of ours that an imported name lies in; None for a name of somebody else's."""
    parts = target.split(".")
    if parts[0] != PACKAGE:
        return None
    for length in range(len(parts), 1, -1):
        name = ".".join(parts[1:length])
        if name in MODULES or length == 2:
            return name
    return None


def complaints(module: str, found: list[Import]) -> list[str]:
    """What is wrong with a module's imports, each in one line."""
    wrong = []
    default = [f"{module.rpartition('.')[0]}.*", "config"] if "." in module else ["config"]
    allowed = next((may for who, may in OURS.items() if fnmatch(module, who)), default)
    for target, inside, line in found:
        here = f"{PACKAGE}/{module.replace('.', '/')}.py:{line} imports {target}"
        for who, what, why in NEVER:
            if fnmatch(module, who) and below(target, what):
                wrong.append(f"{here}, but must not know {what.removesuffix('*')}: {why}")
        own = own_module(target)
        free = own not in MODULES or own in ("errors", "__init__")
        if not free and not any(fnmatch(own, pattern) for pattern in allowed):
            known = ", ".join(allowed) or "nothing of ours"
            wrong.append(f"{here}, but may know only {known} (and errors): see DESIGN.md, Who may know whom")
        if target.split(".")[0] == "torchtitan" and not (
            any(fnmatch(module, who) for who in TORCHTITAN)
            or (inside and module in TORCHTITAN_INSIDE_FUNCTIONS)
            or target.rpartition(".")[2] in TORCHTITAN_NAMES.get(module, ())
        ):
            may = ""
            if module in TORCHTITAN_INSIDE_FUNCTIONS:
                may = " (at the top; inside a function it may, because importing torchtitan takes 9 s)"
            elif module in TORCHTITAN_NAMES:
                may = f" (only {' and '.join(TORCHTITAN_NAMES[module])})"
            wrong.append(
                f"{here}, but is above the torchtitan boundary{may}: "
                "leaving torchtitan 0.2.2 must mean rewriting only the modules below it"
            )
    return wrong


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_walls(module):
    path = MODULES[module]
    found = list(imports(path.read_text(), module, path.name == "__init__.py"))
    assert not complaints(module, found), "\n" + "\n".join(complaints(module, found))


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("model.decoder", "from titan_fp8.float8.linear import Float8Linear", "convert swaps them"),
        ("model.decoder", "from ..float8 import linear", "convert swaps them"),
        (
            "model.decoder",
            "from torchtitan.tools.logging import logger",
            "only BaseModelArgs and ModelProtocol",
        ),
        ("float8.kernels.gemm", "from torch import nn", "kernels are functions"),
        ("float8.kernels.gemm", "import torch.nn.functional as F", "kernels are functions"),
        ("float8.linear", "from torchtitan.tools.logging import logger", "above the torchtitan boundary"),
        ("float8.linear", "def f():\n    from titan_fp8 import config", "may know only float8.kernels*"),
        ("float8.scaling", "import titan_fp8.stability.statistics", "do not know that they are watched"),
        ("stability.predictor", "import torch", "also runs on logs"),
        ("stability.predictor", "import numpy, prometheus_client", "the exporter tells"),
        ("stability.policy", "from . import processor", "may know only nothing of ours"),
        ("stability.console", "from titan_fp8.model import decoder", "may know only stability.*, config"),
        ("config", "import torchtitan.config", "inside a function it may"),
        ("config", "from titan_fp8.train import main", "train is the entry point"),
    ],
)
def test_a_breach_is_named(module, source, words):
    text = "\n".join(complaints(module, list(imports(source, module))))
    assert words in text and f"{PACKAGE}/{module.replace('.', '/')}.py:" in text


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config", "def load():\n    from torchtitan.config import ConfigManager"),
        ("config", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torchtitan"),
        ("model.decoder", "from torchtitan.protocols.model import ModelProtocol"),
        ("model.decoder", "from .activations import xielu\nfrom titan_fp8.errors import UserError"),
        ("float8.kernels.gemm", "import torch\nfrom titan_fp8.float8 import formats"),
        (
            "float8.linear",
            "from .kernels import gemm\nfrom .scaling import DelayedScaling\nfrom torch import nn",
        ),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert complaints(module, list(imports(source, module))) == []
