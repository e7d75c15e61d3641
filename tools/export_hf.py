#!/usr/bin/env python3
"""Write a checkpoint as a folder that transformers loads: weights, configuration and tokeniser.

    python tools/export_hf.py --config train_configs/debug.toml --checkpoint outputs/debug/checkpoint/step-200 --out exported

    model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("exported", trust_remote_code=True)

A Llama becomes transformers' own Llama and needs no remote code; Smooth-SwiGLU is SwiGLU once training is over. Any other
setting of the decoder takes with it the two files of tools/export/, which `trust_remote_code` runs. Give the run's own TOML
and overrides (`--architecture.n_layers=2`): what has no weights (softmax_scale, norm_placement, ...) stands nowhere else.
transformers 4.57 and 5 read the folder.

The model computes what training's does without FP8. Weights are rounded to bfloat16, which training's GEMMs read; `--dtype
float32` keeps every bit. One shard at a time is in memory. The folder gets its name only when it is complete.

A checkpoint's table of contents is a pickle: export only checkpoints that you trust.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from titan_fp8 import device

device.install()

import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.distributed.checkpoint import FileSystemReader  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata  # noqa: E402

from titan_fp8 import checkpoint_folder as folders  # noqa: E402
from titan_fp8.checkpoint import FP8_STATE, compare_weights  # noqa: E402
from titan_fp8.config import load_config  # noqa: E402
from titan_fp8.data.sources import hash64  # noqa: E402
from titan_fp8.data.tokenizer import Tokenizer  # noqa: E402
from titan_fp8.errors import UserError, in_one_line  # noqa: E402
from titan_fp8.files import new_folder  # noqa: E402
from titan_fp8.model.args import FLAVORS, DecoderArgs  # noqa: E402
from titan_fp8.model.decoder import Decoder  # noqa: E402
from titan_fp8.model.hf import LlamaAdapter, is_llama  # noqa: E402
from titan_fp8.spec import build_tokenizer  # noqa: E402

REMOTE_CODE = Path(__file__).resolve().parent / "export"
SHARD_BYTES = 5_000_000_000
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def export(
    config: Any, checkpoint: Path, out: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write the folder `out` from `checkpoint`, a run's `step-<n>`; `config` is what `load_config` returns.

    Returns the number of parameters. Raises UserError if `out` exists, the disk is too small, or the checkpoint is damaged
    or of another model or tokeniser; nothing is left behind then.
    """
    if out.exists():
        raise UserError(f"--out must not exist yet, got {out}: remove it, or choose another")
    tokenizer = build_tokenizer(config)
    args = FLAVORS[config.model.flavor]
    args.update_from_config(config)
    metadata = _read_table(checkpoint)
    shapes = _check_weights(metadata, args, checkpoint)
    _check_tokenizer(metadata, tokenizer, checkpoint)
    need = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if need > free:
        raise UserError(
            f"--out needs {need / 2**30:.1f} GiB, got {free / 2**30:.1f} free in {out.parent}: make room or choose another"
        )
    with new_folder(out) as partial:
        _write_weights(metadata, shapes, args, checkpoint, partial, dtype, shard_bytes)
        _write_json(partial / "config.json", model_config(args, tokenizer, dtype))
        _write_json(partial / "generation_config.json", generation_config(args, tokenizer))
        write_tokenizer(tokenizer, partial, args.seq_len)
        if not is_llama(args):
            for source in REMOTE_CODE.glob("*_fog.py"):
                shutil.copyfile(source, partial / source.name)
    return sum(math.prod(shape) for shape in shapes.values())


# ---- What is in the checkpoint ----


def _read_table(checkpoint: Path) -> Metadata:
    """The checkpoint's table of contents. UserError if `checkpoint` is not a complete one of torch's format."""
    if (checkpoint / folders.HF_TABLE).is_file():
        raise UserError(f"--checkpoint must be of torch's format, got a Hugging Face export: {checkpoint}")
    if not (checkpoint / folders.TORCH_TABLE).is_file() or checkpoint.name.startswith(folders.PARTIAL):
        inside = folders.complete_steps(checkpoint) or folders.complete_steps(checkpoint.parent)
        raise UserError(
            f"--checkpoint must be a run's complete step-<n>, got {checkpoint}: choose one (there are steps "
            f"{folders.listed(inside)})"
        )
    try:
        return FileSystemReader(checkpoint).read_metadata()
    except Exception as error:  # a damaged pickle can raise anything
        raise _unreadable(checkpoint, error) from error


def _check_weights(metadata: Metadata, args: DecoderArgs, checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the model's weights, once they are the checkpoint's. UserError."""
    paths = metadata.planner_data or {}  # flattened name -> its path; a weight's path has one part
    saved = {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        and len(paths.get(name, (name,))) == 1
        and not name.startswith(FP8_STATE)
    }
    with torch.device("meta"):
        here = {name: tuple(weight.shape) for name, weight in Decoder(args).state_dict().items()}
    if differences := compare_weights(saved, here):
        more = f"; and {len(differences) - 3} more" if differences[3:] else ""
        raise UserError(
            f"{checkpoint} is a checkpoint of another architecture or vocabulary: {'; '.join(differences[:3])}{more}: give "
            "the TOML and the overrides it was trained with"
        )
    return here


def _check_tokenizer(metadata: Metadata, tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Refuse another tokeniser of the same size; a checkpoint of the model alone does not say which it was."""
    entry = metadata.state_dict_metadata.get("dataloader.fingerprint")
    if not isinstance(entry, TensorStorageMetadata):
        return
    state = {"dataloader.fingerprint": torch.empty(entry.size, dtype=torch.int64)}
    _load(state, checkpoint)
    if hash64(tokenizer.identity) >> 1 not in state["dataloader.fingerprint"].tolist():
        raise UserError(
            f"{checkpoint} was trained with another tokeniser, got {tokenizer.identity}: give the TOML it was trained with"
        )


def _load(state: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Fill the tensors of `state` from the checkpoint. UserError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what we want
            dcp.load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    except CheckpointException as error:
        raise _unreadable(checkpoint, next(iter(error.failures.values()))[0]) from error


def _unreadable(checkpoint: Path, error: BaseException) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"--checkpoint must be readable, got {checkpoint}: {reason}: choose another step")


# ---- What is written ----


def exported_names(args: DecoderArgs, names: list[str]) -> dict[str, str]:
    """Our name -> the exported one."""
    if is_llama(args):
        return {
            ours: theirs for theirs, ours in LlamaAdapter(args, None).to_hf({n: n for n in names}).items()
        }
    return {name: "lm_head.weight" if name == "output.weight" else f"model.{name}" for name in names}


def _write_weights(
    metadata: Metadata,
    shapes: dict[str, tuple[int, ...]],
    args: DecoderArgs,
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """safetensors, in shards of at most `shard_bytes` (or of one tensor), with an index if there are several."""
    exported = exported_names(args, list(shapes))
    shards = list(_shards({name: math.prod(s) * dtype.itemsize for name, s in shapes.items()}, shard_bytes))
    index = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else "model.safetensors"
        state = {
            name: torch.empty(shapes[name], dtype=metadata.state_dict_metadata[name].properties.dtype)
            for name in names
        }
        _load(state, checkpoint)
        tensors = {exported[name]: state.pop(name).to(dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    if shards[1:]:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        _write_json(folder / folders.HF_TABLE, {"metadata": {"total_size": total}, "weight_map": index})


def _shards(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """The names in their order, cut where the next one would take a shard above `limit` bytes."""
    names, filled = [], 0
    for name, size in sizes.items():
        if names and filled + size > limit:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def model_config(args: DecoderArgs, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """config.json. Keys that transformers 4 and 5 name differently stand in both forms."""
    precision = str(dtype).removeprefix("torch.")
    common = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "max_position_embeddings": args.seq_len,  # what it was trained on
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "initializer_range": args.init_std,
        "tie_word_embeddings": args.tie_embeddings,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": precision,
        "torch_dtype": precision,
    }
    if is_llama(args):
        return common | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
        }
    return common | {
        "architectures": ["FogForCausalLM"],
        "model_type": "titan_fog",
        "auto_map": {
            "AutoConfig": "configuration_fog.FogConfig",
            "AutoModel": "modeling_fog.FogModel",
            "AutoModelForCausalLM": "modeling_fog.FogForCausalLM",
        },
        "norm_placement": args.norm_placement,
        "qk_norm": args.qk_norm,
        "activation": args.activation.removeprefix("smooth_"),
        "softmax_scale": args.softmax_scale,
        "input_scale": args.input_scale,
        "post_norm_gain": args.post_norm_gain,
        "final_norm": args.final_norm,
    }


def generation_config(args: DecoderArgs, tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json. Ids that only fill the vocabulary up are never generated."""
    config: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    filling = list(range(tokenizer.get_vocab_size(), args.vocab_size))
    return config | ({"suppress_tokens": filling} if filling else {})


def write_tokenizer(tokenizer: Tokenizer, folder: Path, seq_len: int) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE that gives our ids, with bos in front as in training.

    tiktoken merges the two neighbours whose joined bytes have the lowest rank, so the merges are all ways to cut a token in
    two tokens, in the order of ranks. One difference stays: where a text spells a special token's name, transformers reads
    the special token (`split_special_tokens=True` turns that off), and training never does.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Fast

    encoding, ranks = tokenizer._encoding, tokenizer._ranks
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    specials = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token, _ in sorted(ranks.items(), key=lambda item: item[1])
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    if taken := [name for name, _ in specials if name in vocabulary]:
        raise UserError(f"a special token must not be an ordinary one too, got {taken[0]}: rename it")
    # tiktoken takes a piece that is a token whole, without merging; nothing ever merges in a tokeniser of bytes.
    fast = Fast(models.BPE(vocabulary | dict(specials), merges, ignore_merges=bool(merges)))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(encoding._pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name, _ in specials])
    names = {number: name for name, number in specials}
    bos, eos, pad = (names.get(number) for number in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    fast.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "bos_token": bos,
        "eos_token": eos,
    }
    _write_json(folder / "tokenizer_config.json", config | ({"pad_token": pad} if pad is not None else {}))


def _byte_letters() -> list[str]:
    """The letter by which byte-level BPE files write each byte: itself if it prints, else one from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="the run's TOML file")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's step-<n>")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    options, overrides = parser.parse_known_args(argv)
    try:
        config = load_config(["--job.config_file", options.config, *overrides])
        count = export(config, options.checkpoint, options.out, DTYPES[options.dtype])
    except OSError as error:
        raise UserError(
            f"--out must be on a disk that takes it, got {error}: mend that and start again"
        ) from error
    remote = "" if is_llama_config(options.out) else ", trust_remote_code=True"
    print(
        f'{options.out}: {count:,} parameters. AutoModelForCausalLM.from_pretrained("{options.out}"{remote})'
    )
    return 0


def is_llama_config(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["model_type"] == "llama"


if __name__ == "__main__":
    sys.exit(main())
