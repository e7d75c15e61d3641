"""FP8 attention's operators against attention written out in float64, with every operand rounded to FP8 by hand.

The same comparison runs on CPU (the plain-PyTorch references) and on a Hopper GPU (the kernels, marked `gpu`). On CPU the
Triton kernels also run through Triton's interpreter (this file as a script: it must be switched on before Triton is
imported), and all are compiled for Hopper, with the compiler's complaints read.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

if __name__ != "__main__":
    from titan_fp8.float8.kernels import attention as ops
from titan_fp8.errors import UserError
from titan_fp8.float8.formats import E4M3, E5M2, FP8_MAX

gpu = pytest.mark.gpu
QUADS = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
PAIRS = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]


def draw(batch, heads, groups, seq_len, dim, device="cpu", seed=0) -> list[Tensor]:
    """Unit-normal q, k, v, do in bfloat16, stored as [B, S, heads, C]: not contiguous as [B, heads, S, C]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, seq_len, n, dim) for n in (heads, groups, groups, heads)]
    return [torch.randn(s, generator=generator).bfloat16().to(device).transpose(1, 2) for s in shapes]


def zero(device) -> Tensor:
    return torch.zeros((), device=device)


@dataclass
class Run:
    """One forward and backward through the operators. `scales` and `amax` are keyed q, k, v, do, ds."""

    scales: dict[str, Tensor]
    softmax_scale: float = 0.125
    do_dtype: torch.dtype = E4M3
    ds_dtype: torch.dtype = E4M3

    def __call__(self, q, k, v, do) -> dict[str, Tensor]:
        s, seq_len = self.scales, q.shape[2]
        self.amax = {name: zero(q.device) for name in ("q", "k", "v", "do", "ds")}
        q8, q8_t = ops.attention_cast(q, s["q"], self.amax["q"], E4M3, True, True, True, False)
        k8, k8_t = ops.attention_cast(k, s["k"], self.amax["k"], E4M3, True, True, True, True)
        v8, v8_t = ops.attention_cast(v, s["v"], self.amax["v"], E4M3, True, True, True, False)
        o, shift = ops.attention_forward(q8, k8, v8_t, s["q"], s["k"], s["v"], self.softmax_scale, seq_len)
        do8, do8_t, delta = ops.attention_cast_gradient(
            do, o, s["do"], s["ds"], self.amax["do"], self.do_dtype, True
        )
        self.backward = (
            q8, k8, q8_t, k8_t, v8, do8, do8_t, shift, delta, s["q"], s["k"], s["v"], s["do"], s["ds"],
            self.amax["ds"], self.softmax_scale, seq_len, self.ds_dtype, True,
        )  # fmt: skip
        dq, dk, dv = ops.attention_backward(*self.backward)
        return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def emulate(fp8, run: Run, q, k, v, do, rounding: bool = True) -> dict[str, Tensor]:
    """The documented mathematics in float64 on CPU; without `rounding` plain attention. Sets run.ds_amax."""
    repeat = q.shape[1] // k.shape[1]

    def rounded(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not rounding:
            return x.double()
        scale = run.scales[name].double().cpu() if name != "p" else torch.tensor(256.0)
        return fp8.rounded((x.double() * scale).float().double(), dtype) / scale

    q, k, v, do = (t.double().cpu() for t in (q, k, v, do))
    true_do = do
    q, k, v = rounded("q", q, E4M3), rounded("k", k, E4M3), rounded("v", v, E4M3)
    do = rounded("do", do, run.do_dtype)
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    s = run.softmax_scale * q @ k.mT
    s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -math.inf)
    m = s.amax(-1, keepdim=True)
    p = torch.exp(s - m)
    l = p.sum(-1, keepdim=True)  # noqa: E741
    o = (rounded("p", p, E4M3) @ v / l).bfloat16().double()
    p = p / l
    d = p * (do @ v.mT - (true_do * o).sum(-1, keepdim=True))
    run.ds_amax = d.abs().max().item()
    d8 = rounded("ds", d, run.ds_dtype)
    dk, dv = (t.unflatten(1, (-1, repeat)).sum(2) for t in (d8.mT @ q, rounded("p", p, E4M3).mT @ do))
    return {"o": o, "dq": run.softmax_scale * d8 @ k, "dk": run.softmax_scale * dk, "dv": dv}


def run_for(fp8, q, k, v, do, **options) -> Run:
    """A Run whose scales fit the inputs, dS's too."""
    run = Run(
        {name: fp8.scale_for(x, E4M3).to(q.device) for name, x in (("q", q), ("k", k), ("v", v))}, **options
    )
    run.scales["do"] = fp8.scale_for(do, run.do_dtype).to(q.device)
    emulate(fp8, run, q, k, v, do, rounding=False)
    run.scales["ds"] = torch.tensor(FP8_MAX[run.ds_dtype] / run.ds_amax, device=q.device)
    return run


def compare(fp8, inputs, tolerance: float, **options) -> None:
    """The operators against the emulation.

    P and dS that lie near a tie round to the other neighbour, and the online softmax rounds P against an earlier maximum:
    single values then differ by one step (at most 1/8), most by nothing. Measured: o at most 0.015, gradients 0.012.
    """
    run = run_for(fp8, *inputs, **options)
    got, expected = run(*inputs), emulate(fp8, run, *inputs)
    for name, x in expected.items():
        assert got[name].dtype == torch.bfloat16
        assert fp8.relative(got[name].cpu(), x) < tolerance, name
    for name, x in zip(("q", "k", "v", "do"), inputs, strict=True):
        assert run.amax[name].item() == x.abs().max().item()
    assert run.amax["ds"].item() == pytest.approx(run.ds_amax, rel=1e-2)


# ---- The casts ----


def test_the_two_layouts_of_a_cast(fp8):
    x = draw(2, 3, 1, 130, 64)[0]
    scale, seen = torch.tensor(100.0), zero("cpu")  # 100 * 4.48 is the limit: some saturate
    codes = fp8.encode((x.float() * scale).double(), E4M3)
    for pairs, order in ((False, QUADS), (True, PAIRS)):
        x8, x8_t = ops.attention_cast(x, scale, seen, E4M3, True, True, True, pairs)
        assert torch.equal(fp8.codes(x8)[:, :, :130], codes)
        assert not fp8.codes(x8)[:, :, 130:].any() and x8.shape[2] == 256
        expected = torch.zeros(2, 3, 256, 64, dtype=torch.uint8)
        expected[:, :, :130] = codes
        where = (torch.arange(0, 256, 16)[:, None] + torch.tensor(order)).flatten()
        assert torch.equal(fp8.codes(x8_t), expected[:, :, where].mT.contiguous())
    assert seen.item() == x.abs().max().item()


def test_a_cast_makes_only_what_is_asked_for():
    x, scale, seen = draw(1, 2, 1, 16, 64)[0], torch.tensor(1.0), zero("cpu")
    x8, x8_t = ops.attention_cast(x, scale, seen, E4M3, False, True, False, False)
    assert x8.numel() and not x8_t.numel() and seen.item() == 0.0
    x8, x8_t = ops.attention_cast(x, scale, seen, E4M3, False, False, True, False)
    assert x8_t.numel() and not x8.numel()


def interpreted() -> None:
    """The Triton kernels in the interpreter, against their references. Runs as a script with TRITON_INTERPRET=1."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    from titan_fp8.float8.kernels import attention_backward as backward
    from titan_fp8.float8.kernels import attention_cast as cast

    # The interpreter's own float8 conversion rounds half up and loses a carry: PyTorch's, saturating, stands in.
    original, formats = interpreter._convert_float, {tl.float8e4nv: E4M3, tl.float8e5: E5M2}

    def convert(x, source, target, mode):
        if target not in formats:
            return original(x, source, target, mode)
        value = torch.from_numpy(np.ascontiguousarray(x).view(np.float32).copy())
        limit = FP8_MAX[formats[target]]
        return value.clamp(-limit, limit).to(formats[target]).view(torch.uint8).numpy()

    interpreter._convert_float = convert
    cast.wrap_triton = lambda kernel: kernel

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))

    q, k, v, do = draw(2, 2, 1, 70, 64)
    strange = torch.randn(2, 64, 70, 2).bfloat16().permute(0, 3, 2, 1)  # C is not the contiguous dimension
    strange[0, 0, 3, 5], strange[1, 1, 69, 0] = math.inf, math.nan
    for x, dtype, pairs in ((q, E4M3, False), (k, E4M3, True), (v, E5M2, False), (strange, E4M3, True)):
        seen, seen_too = zero("cpu"), zero("cpu")
        arguments = (dtype, True, True, True, pairs)
        got = cast.launch_cast(x, torch.tensor(200.0), seen, *arguments)
        expected = cast.cast_reference(x, torch.tensor(200.0), seen_too, *arguments)
        assert same(got[0], expected[0]) and same(got[1], expected[1])
        assert seen.item() == seen_too.item() or (x is strange and seen.isnan() and seen_too.isnan())

    arguments = (torch.tensor(50.0), torch.tensor(3.0))
    got = cast.launch_cast_gradient(do, q, *arguments, seen := zero("cpu"), E5M2, True)
    expected = cast.cast_gradient_reference(do, q, *arguments, zero("cpu"), E5M2, True)
    assert same(got[0], expected[0]) and same(got[1], expected[1]) and seen.item() == do.abs().max().item()
    torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-5)

    # dQ = dS K with dS in tiles on and below the diagonal: 256 rows are three tiles of 128 x 128 per head.
    heads, length, dim = 2, 256, 64
    dense = torch.randn(heads, length, length).tril()
    columns = cast.reorder(dense, pairs=True).to(E4M3)
    ds8 = torch.cat(
        [
            columns[h, 128 * r :][:128, 128 * c :][:, :128]
            for h in range(heads)
            for r in (0, 1)
            for c in range(r + 1)
        ]
    )
    key = torch.randn(1, 1, length, dim)
    k8_t = cast.reorder(key.mT, pairs=True).to(E4M3).contiguous()
    dq = torch.full((1, heads, 200, dim), math.nan, dtype=torch.bfloat16)
    backward.launch_q(ds8.contiguous(), k8_t, torch.tensor(2.0), torch.tensor(4.0), dq, 0.5)
    expected = dense.to(E4M3).float() @ key[0].to(E4M3).float() * (0.5 / 8)
    torch.testing.assert_close(dq[0].float(), expected[:, :200], rtol=1e-2, atol=1e-3)


def script(what: str, **environment: str) -> str:
    """Run a function of this file in its own process; its output."""
    command = [sys.executable, __file__, what]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_triton_kernels_in_the_interpreter():
    script("interpreted", TRITON_INTERPRET="1")


# ---- Forward and backward ----


@pytest.mark.parametrize("shape", [(2, 4, 2, 96, 64), (1, 2, 2, 130, 64), (1, 8, 1, 17, 128)])
def test_references_compute_the_documented_function(fp8, shape):
    compare(fp8, draw(*shape), 3e-3)  # no online softmax here: what is left is bf16's rounding of the results


def test_e5m2_gradients_on_the_reference(fp8):
    compare(fp8, draw(1, 4, 2, 96, 64), 3e-3, do_dtype=E5M2, ds_dtype=E5M2)


def test_errors_against_exact_attention(fp8):
    """On unit-normal inputs: the bound is what cuDNN's FP8 attention has (REFERENCE.md, 3). E5M2 does not reach it."""
    inputs = draw(1, 4, 2, 200, 64)
    errors = {}
    for dtype in (E4M3, E5M2):
        run = run_for(fp8, *inputs, do_dtype=dtype, ds_dtype=dtype)
        exact, got = emulate(fp8, run, *inputs, rounding=False), run(*inputs)
        errors[dtype] = {name: fp8.relative(got[name], exact[name]) for name in exact}
    assert errors[E4M3]["dq"] < 0.075 and errors[E4M3]["dk"] < 0.075 and errors[E4M3]["dv"] < 0.057
    assert 0.075 < errors[E5M2]["dk"] < 0.12


def test_fake_tensors_have_the_results_shapes_and_strides(fp8):
    """(opcheck's other tests compute with the operands, which float8 does not allow.)"""
    inputs = draw(1, 4, 2, 20, 64)
    run = run_for(fp8, *inputs)
    run(*inputs)
    seen, (sq, sk, sv, sdo, sds) = zero("cpu"), run.scales.values()
    q8, k8, *_ = run.backward
    v8_t = ops.attention_cast(inputs[2], sv, seen, E4M3, False, False, True, False)[1]
    calls = [
        (ops.attention_cast, (inputs[1], sk, seen, E4M3, True, True, True, True)),
        (ops.attention_cast, (inputs[1], sk, seen, E5M2, True, False, True, False)),
        (ops.attention_cast_gradient, (inputs[3], inputs[0], sdo, sds, seen, E5M2, True)),
        (ops.attention_forward, (q8, k8, v8_t, sq, sk, sv, 0.125, 20)),
        (ops.attention_backward, run.backward),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils="test_faketensor")


def test_the_flop_counter_sees_two_and_five_gemms(fp8):
    inputs = draw(1, 4, 2, 20, 64)
    run = run_for(fp8, *inputs)
    with FlopCounterMode(display=False) as counter:
        run(*inputs)
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    gemm = 2 * 4 * 20 * 20 * 64
    assert flops == {"titan_fp8.attention_forward": 2 * gemm, "titan_fp8.attention_backward": 5 * gemm}


def test_what_the_kernels_do_not_take():
    q, k, v, _ = draw(1, 4, 2, 16, 32)
    with pytest.raises(UserError, match="head_dim 64 or 128, got 32"):
        ops.check_operands(q, k, v)
    q, k, v, _ = draw(1, 4, 3, 16, 64)
    with pytest.raises(UserError, match="multiple of K"):
        ops.check_operands(q, k, v)
    q, k, v, _ = draw(1, 4, 2, 16, 64)
    with pytest.raises(UserError, match=r"bfloat16 k, got torch\.float32"):
        ops.check_operands(q, k.float(), v)
    ops.check_operands(q, k, v)


def test_compiles_for_hopper(tmp_path):
    """Without a GPU: Triton's compiler and ptxas for sm_90. ptxas must not run matrix products one by one (it says so)."""
    for line in script("compiled", TRITON_CACHE_DIR=str(tmp_path), TRITON_DUMP_PTXAS_LOG="1").splitlines():
        assert "serialized" not in line, line


def shared_memory(ptx: str) -> dict[str, set[int]]:
    """Bytes of shared memory that are mbarriers, and those at known places that plain instructions read or write.

    Memory that was a barrier may not become anything else (PTX: without mbarrier.inval what follows is undefined). Triton
    does reuse it once a barrier has no more users in the program's order, which other warps may not have come to.
    """
    places = {r: int(n) for r, n in re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx)}
    places |= dict.fromkeys(re.findall(r"mov\.b32\s+(%r\d+), global_smem;", ptx), 0)
    barriers = {
        places[r] + i
        for r in re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]", ptx)
        for i in range(8)
    }
    plain = set()
    pattern = r"(?:ld|st)\.shared(?:\.v(\d))?\.b(\d+)\s[^;]*\[global_smem(?:\+(\d+))?\]"
    for count, bits, place in re.findall(pattern, ptx):
        plain |= {int(place or 0) + i for i in range(int(count or 1) * int(bits) // 8)}
    return {"barriers": barriers, "plain": plain}


def compiled() -> None:
    """Compile the Gluon kernels; Triton prints what ptxas says."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from titan_fp8.float8.kernels import attention_backward, attention_forward

    def tile(dtype: str, size: int, *block: int) -> str:
        swizzle = min(128, block[-1] * size) if len(block) == 2 else 0
        return (
            f"tensordesc<{dtype}{list(block)},{gl.NVMMASharedLayout(swizzle, 8 * size, rank=len(block))!r}>"
        )

    def build(function, types: dict[str, str], constants: dict) -> None:
        names = function.arg_names
        other = {n: "*fp32" if n.startswith("scale") else "i32" for n in names}
        signature = (
            other | {n: t for n, t in types.items() if n in names} | dict.fromkeys(constants, "constexpr")
        )
        source = GluonASTSource(function, signature, {(names.index(n),): c for n, c in constants.items()}, {})
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert kernel.metadata.shared <= 232448  # what a Hopper multiprocessor has
        assert f"wgmma.mma_async.sync.aligned.m64n{constants['C']}k32.f32.e4m3" in kernel.asm["ptx"]
        shared = shared_memory(kernel.asm["ptx"])
        assert shared["barriers"] and not shared["barriers"] & shared["plain"], shared

    pointers = {
        "o": "*bf16",
        "dk_out": "*bf16",
        "dv_out": "*bf16",
        "amax_bits": "*i32",
        "softmax_scale": "fp32",
    }
    for dim in (64, 128):
        types = pointers | {name: tile("fp8e4nv", 1, 64, dim) for name in ("q8", "do8")}
        types |= {name: tile("fp8e4nv", 1, dim, 64) for name in ("q8_t", "do8_t")}
        types |= {name: tile("fp8e4nv", 1, 128, dim) for name in ("k8", "v8")}
        types |= {"v8_t": tile("fp8e4nv", 1, dim, 128), "ds": tile("u16", 2, 64, 32)}
        build(attention_forward.forward_kernel, types | {"shift": "*fp32"}, {"C": dim})
        types |= {"shift": tile("fp32", 4, 64), "delta": tile("fp32", 4, 64)}
        for record in (True, False):
            constants = {"C": dim, "RECORD": record, "P_SCALE": 256.0, "DS_DTYPE": gl.float8e4nv}
            build(attention_backward.kv_kernel, types, constants)


def test_shards_of_batch_and_heads_are_shards_of_attention(fp8, gloo):
    """DTensor's rules for the operators; one rank, so that it is the placements that are tested."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    inputs = draw(2, 4, 2, 130, 64)
    run = run_for(fp8, *inputs)
    expected = run(*inputs)
    scales = {name: distribute_tensor(s, mesh, [Replicate()]) for name, s in run.scales.items()}
    for how in (Shard(0), Shard(1), Replicate()):
        got = Run(scales)(*(distribute_tensor(t, mesh, [how]) for t in inputs))
        for name in ("o", "dq", "dk", "dv"):
            assert got[name].placements == (how,) and torch.equal(got[name].full_tensor(), expected[name]), (
                name
            )


# ---- On a Hopper GPU ----


def poison() -> None:
    """Fill the allocator's free memory with NaN (0xff in every format): what a kernel leaves unwritten shows."""
    torch.full((3 << 30,), 0xFF, dtype=torch.uint8, device="cuda")


@gpu
@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E5M2, E5M2), (E5M2, E4M3)])
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 2, 128, 128), (2, 4, 1, 300, 64), (1, 8, 1, 513, 128), (3, 3, 3, 17, 64), (1, 8, 2, 640, 128)],
)
def test_kernels_compute_the_documented_function(fp8, shape, dtypes):
    poison()
    compare(fp8, draw(*shape, device="cuda"), 0.02, do_dtype=dtypes[0], ds_dtype=dtypes[1])


@gpu
def test_random_shapes(fp8):
    generator = torch.Generator().manual_seed(1)
    for seed in range(8):
        batch, groups, ratio, seq_len = (
            int(torch.randint(1, n, (), generator=generator)) for n in (3, 4, 9, 700)
        )
        poison()
        compare(fp8, draw(batch, groups * ratio, groups, seq_len, (64, 128)[seed % 2], "cuda", seed), 0.02)


@gpu
def test_kernels_saturate_and_flush_as_documented(fp8):
    """Scales 64 times too large (q, dO and dS saturate) and 2^12 too small (most of them underflow)."""
    inputs = draw(1, 4, 2, 256, 128, device="cuda")
    for factor in (64.0, 2.0**-12):
        run = run_for(fp8, *inputs)
        for name in ("q", "do", "ds"):
            run.scales[name] = run.scales[name] * factor
        got, expected = run(*inputs), emulate(fp8, run, *inputs)
        for name, x in expected.items():
            scale = max(x.norm().item(), 1e-30)
            assert (got[name].double().cpu() - x).norm().item() <= 0.03 * scale, (factor, name)


@gpu
def test_zeros_give_zeros_and_nan_comes_out(fp8):
    inputs = [torch.zeros_like(t) for t in draw(1, 4, 2, 200, 64, device="cuda")]
    run = Run({name: torch.ones((), device="cuda") for name in ("q", "k", "v", "do", "ds")})
    assert all(not x.any() for x in run(*inputs).values())
    for which, name in enumerate(("q", "k", "v", "do")):
        inputs = draw(1, 4, 2, 200, 64, device="cuda")
        run = run_for(fp8, *inputs)
        inputs[which][0, 0, 150, 7] = math.nan
        got = run(*inputs)
        assert run.amax[name].isnan() and run.amax["ds"].isnan(), name
        if name != "do":
            # In the tile of a NaN value, P = 0 of an earlier query times NaN is NaN, as in bf16 kernels.
            clean = 128 if name == "v" else 150
            assert got["o"][0, 0, 150:].isnan().any(-1)[0] and not got["o"][0, 0, :clean].isnan().any(), name
        assert got["dq"][0, 0, 150].isnan().any() and got["dk"].isnan().any(), name
        # Tiles of 128: in the tile of a NaN key, dS = 0 of an earlier query times NaN is NaN, as in bf16 kernels; and dS of
        # a query has its o.
        assert not got["dq"][0, 0, : 128 if name in ("k", "v") else 150].isnan().any(), name


@gpu
def test_backward_is_deterministic_and_scratch_does_not_change_it(fp8):
    from titan_fp8.float8.kernels.attention_backward import launch_backward

    inputs = draw(2, 8, 4, 1000, 128, device="cuda")
    run = run_for(fp8, *(t[:, :, :64] for t in inputs))
    first = run(*inputs)
    for scratch in (None, None, 8 * 36 * 128 * 128, 2 * 36 * 128 * 128, 1):  # two batches, one, one kv head
        poison()
        options = {} if scratch is None else {"scratch_bytes": scratch}
        again = launch_backward(*run.backward, **options)
        for name, x in zip(("dq", "dk", "dv"), again, strict=True):
            assert torch.equal(x, first[name]), (scratch, name)


@gpu
@pytest.mark.parametrize("shape, dtype", [((32, 4, 2, 256, 64), E5M2), ((2, 32, 8, 2048, 128), E4M3)])
def test_launch_after_launch_gives_the_same_bits(fp8, shape, dtype):
    """Thousands of launches, one behind the other, each with scales in new memory, on a GPU that other tests use too: what
    once returned a NaN in one of 4,000 (CHANGELOG, "Fixed")."""
    inputs = draw(*shape, device="cuda")
    run = Run(
        {name: torch.tensor(80.0, device="cuda") for name in ("q", "k", "v", "do", "ds")},
        do_dtype=dtype, ds_dtype=dtype,
    )  # fmt: skip
    first = run(*inputs) | {"amax": run.amax["ds"]}
    assert all(x.isfinite().all() for x in first.values())
    different = torch.zeros(len(first), device="cuda", dtype=torch.int64)
    scales = run.scales
    for _ in range(6000 if shape[3] == 256 else 1500):
        run.scales = {name: scale * 1.0 for name, scale in scales.items()}
        again = run(*inputs) | {"amax": run.amax["ds"]}
        different += torch.stack([(again[name] != x).any() for name, x in first.items()])
    assert dict(zip(first, different.tolist(), strict=True)) == dict.fromkeys(first, 0)


@gpu
def test_compiled_casts_give_the_same_bits(fp8):
    """Of a tensor with gaps between its rows (as a joined q, k, v has), and of one that the compiler makes."""
    joined = draw(2, 8, 2, 300, 128, device="cuda")[0]
    scale, scale_ds = torch.tensor(90.0, device="cuda"), torch.tensor(3.0, device="cuda")

    def casts(x, seen):
        return (
            *ops.attention_cast(x, scale, seen, E4M3, True, True, True, True),
            *ops.attention_cast(2 * x, scale, seen, E4M3, True, False, True, False),
            *ops.attention_cast_gradient(-x, 2 * x, scale, scale_ds, seen, E5M2, True),
        )

    results = []
    for run in (casts, torch.compile(casts, fullgraph=True)):
        seen = zero("cuda")
        results.append([t.view(torch.uint8) for t in run(joined[:, 2:6], seen)] + [seen])
    for eager, compiled_ in zip(*results, strict=True):
        assert torch.equal(eager, compiled_)


if __name__ == "__main__":
    {"interpreted": interpreted, "compiled": compiled}[sys.argv[1]]()
