"""The decoder against its mathematics written out in float64, its initial state, and what it must never do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_fp8.config import Fp8
from titan_fp8.float8.convert import scaling_state
from titan_fp8.loss import IGNORE_INDEX
from titan_fp8.model.args import DecoderArgs
from titan_fp8.model.decoder import (
    CausalAttention,
    Decoder,
    FrozenRMS,
    RMSNorm,
    ScalarTanh,
    apply_rope,
    rope_table,
)

PRESETS = ("fog_max", "fog_opt", "fog_flash", "llama")


# ---- The reference: plain formulas in float64, one token and head at a time where that is clearer ----


def rotated(x_BSHC: Tensor, theta: float) -> Tensor:
    """RoPE as complex numbers: element i of the first half and of the second half are one number, turned by S * freq."""
    half = x_BSHC.shape[-1] // 2
    numbers = torch.complex(x_BSHC[..., :half], x_BSHC[..., half:])
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x_BSHC.shape[1], dtype=torch.float64)[:, None] * frequencies
    turned = numbers * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    return torch.cat((turned.real, turned.imag), dim=-1)


def rms_normed(x: Tensor, eps: float, gain: Tensor | float = 1.0) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * gain


def reference_attention(x_BSD: Tensor, w: dict[str, Tensor], args: DecoderArgs) -> Tensor:
    B, S, _ = x_BSD.shape

    def heads(name: str, count: int) -> Tensor:
        return (x_BSD @ w[f"attention.{name}.weight"].T).reshape(B, S, count, args.head_dim)

    q, k, v = heads("wq", args.n_heads), heads("wk", args.n_kv_heads), heads("wv", args.n_kv_heads)
    if args.qk_norm in ("rms", "rms_gain"):
        q_gain, k_gain = (w.get(f"attention.{name}_norm.weight", 1.0) for name in "qk")
        q, k = rms_normed(q, args.norm_eps, q_gain), rms_normed(k, args.norm_eps, k_gain)
    elif args.qk_norm == "tanh":
        q, k = (w["attention.q_norm.alpha"] * q).tanh(), (w["attention.k_norm.alpha"] * k).tanh()
    q, k = rotated(q, args.rope_theta), rotated(k, args.rope_theta)
    group = args.n_heads // args.n_kv_heads
    outputs = []
    for head in range(args.n_heads):
        scores = args.softmax_scale * q[:, :, head] @ k[:, :, head // group].transpose(1, 2)
        scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), -math.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        outputs.append(weights @ v[:, :, head // group])
    return torch.cat(outputs, dim=-1) @ w["attention.wo.weight"].T


def reference_ffn(x_BSD: Tensor, w: dict[str, Tensor], args: DecoderArgs) -> Tensor:
    h = x_BSD @ w["feed_forward.w1.weight"].T
    if args.activation == "xielu":
        alpha_p = (1 + w["feed_forward.act.a_p"].exp()).log()
        alpha_n = 0.5 + (1 + w["feed_forward.act.a_n"].exp()).log()
        h = torch.where(h > 0, alpha_p * h * h, alpha_n * (h.clamp(max=-1e-6).expm1() - h)) + 0.5 * h
    elif args.activation == "gelu":
        h = 0.5 * h * (1 + ((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)).tanh())
    else:  # Smooth-SwiGLU is SwiGLU to mathematics
        h = h / (1 + (-h).exp()) * (x_BSD @ w["feed_forward.w3.weight"].T)
    return h @ w["feed_forward.w2.weight"].T


def reference(model: Decoder, tokens_BS: Tensor) -> Tensor:
    args = model.model_args
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    x = weights["tok_embeddings.weight"][tokens_BS] * args.input_scale
    for layer in range(args.n_layers):
        w = {
            n.removeprefix(f"layers.{layer}."): p
            for n, p in weights.items()
            if n.startswith(f"layers.{layer}.")
        }
        attention_norm, ffn_norm = w["attention_norm.weight"], w["ffn_norm.weight"]
        if args.norm_placement == "post":
            x = x + rms_normed(reference_attention(x, w, args), args.norm_eps, attention_norm)
            x = x + rms_normed(reference_ffn(x, w, args), args.norm_eps, ffn_norm)
        else:
            x = x + reference_attention(rms_normed(x, args.norm_eps, attention_norm), w, args)
            x = x + reference_ffn(rms_normed(x, args.norm_eps, ffn_norm), w, args)
    if args.final_norm:
        x = rms_normed(x, args.norm_eps, weights["norm.weight"])
    return x @ weights["tok_embeddings.weight" if args.tie_embeddings else "output.weight"].T


@pytest.mark.parametrize(
    "settings",
    [
        *({"preset": preset} for preset in PRESETS),
        {"preset": "llama", "activation": "smooth_swiglu", "tie_embeddings": True},
        {"preset": "llama", "qk_norm": "tanh", "softmax_scale": 0.3, "shape": {"n_kv_heads": 1}},
        {"preset": "fog_max", "qk_norm": "none", "final_norm": True, "tie_embeddings": True},
        {"preset": "fog_flash", "qk_norm": "rms_gain"},
        {"preset": "fog_flash", "norm_placement": "pre", "shape": {"n_kv_heads": 4, "rope_theta": 10_000.0}},
        {"preset": "fog_opt", "activation": "swiglu", "input_scale": 3.0, "post_norm_gain": 0.2},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_forward_is_the_written_out_formula(settings, make_args, make_model, tokens):
    model = make_model(make_args(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():  # every gain and curvature something else, so that each one matters
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    logits, expected = model(tokens), reference(model, tokens)
    assert logits.dtype == torch.float32 and logits.shape == (2, 16, 96)
    # Float32 rounds some twenty operations in a row to 6e-8 each, 3e-7 if they add up as a random walk.
    assert (logits.double() - expected).norm() / expected.norm() < 1e-6


# ---- Parts ----


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rope_up_to_position_8191(theta):
    cos, sin = rope_table(128, 8192, theta)
    assert cos.shape == sin.shape == (8192, 64) and cos.dtype == torch.float32
    x = torch.randn(1, 8192, 1, 128, generator=torch.Generator().manual_seed(0))
    got, expected = apply_rope(x, cos, sin), rotated(x.double(), theta)
    # An angle of up to 8191 is rounded in its frequency, as an angle and in the product: 3 * 2^-24 of it.
    length = expected.unflatten(-1, (2, 64)).norm(dim=-2).repeat(1, 1, 1, 2)
    assert ((got - expected).abs() <= 8191 * 3 * 2**-24 * length + 1e-6).all()
    assert torch.equal(apply_rope(x, cos, sin)[:, 0], x[:, 0]), "position 0 is not turned"
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_gqa_is_repeated_heads():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 8, 16, 32, generator=generator)
    k, v = (torch.randn(2, 2, 16, 32, generator=generator) for _ in "kv")
    attention = CausalAttention(0.3)
    repeated = attention(q, k.repeat_interleave(4, dim=1), v.repeat_interleave(4, dim=1))
    torch.testing.assert_close(attention(q, k, v), repeated, rtol=1e-5, atol=1e-6)


def test_qk_norms_and_what_they_train(make_args, make_model, tokens):
    assert not list(FrozenRMS(1e-5).parameters())
    x = torch.randn(3, 5, 64) * torch.tensor([1e-1, 1.0, 1e3]).view(3, 1, 1)
    torch.testing.assert_close(FrozenRMS(1e-9)(x).square().mean(-1), torch.ones(3, 5), rtol=1e-4, atol=0)
    norm = ScalarTanh()
    norm.init_weights()
    torch.testing.assert_close(norm(x), x.tanh())

    model = make_model(make_args("fog_opt"))
    model(tokens).square().mean().backward()
    alphas = {n: p for n, p in model.named_parameters() if n.endswith("alpha")}
    assert len(alphas) == 2 * model.model_args.n_layers
    assert all(p.item() == 1 and p.grad.abs() > 0 for p in alphas.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_keeps_its_input_dtype_and_survives_extremes(dtype):
    norm = RMSNorm(64, 1e-5)
    norm.init_weights()
    for size in (0.0, 1e-30, 1.0, 1e15):
        x = (torch.ones(2, 64, dtype=dtype) * size).requires_grad_()
        y = norm(x)
        y.float().sum().backward()
        assert y.dtype == dtype and y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
        assert y[0, 0].item() == pytest.approx(size / math.sqrt(size * size + 1e-5), rel=1e-2)


# ---- The initial state ----


@pytest.mark.parametrize("preset", ["fog_max", "fog_opt", "fog_flash"])
def test_fog_starts_at_unit_scale(preset, make_args, make_model):
    args = make_args(preset, shape={"n_layers": 4, "norm_eps": 1e-9}, vocab_size=512)
    assert args.input_scale == 50 and args.post_norm_gain == 0.5
    assert args.softmax_scale == pytest.approx(math.sqrt(2 / 16)), (
        "0.125 at head_dim 128, the authors' setting"
    )
    model = make_model(args)
    assert model.norm is None and model.output is not None

    seen: dict[str, Tensor] = {}
    model.layers["0"].register_forward_pre_hook(lambda _, inputs: seen.update(stream=inputs[0]))
    model.layers["3"].ffn_norm.register_forward_hook(lambda _, inputs, output: seen.update(branch=output))
    model(torch.arange(512).view(32, 16))
    # 512 * 64 draws: the rms of a sample strays by 1 / sqrt(2 * 32768) = 0.4 %; five times that is allowed.
    assert seen["stream"].square().mean().sqrt().item() == pytest.approx(1, abs=0.02)
    # Every branch comes out with rms 1/sqrt(n_layers) at every token, whatever its size inside.
    branch_rms = seen["branch"].square().mean(-1).sqrt()
    torch.testing.assert_close(branch_rms, torch.full((32, 16), 0.5), rtol=1e-4, atol=0)


def test_initial_weights_have_the_papers_spread(make_args, make_model):
    for preset, residual in (("fog_max", 0.02), ("llama", 0.02 / math.sqrt(2 * 2))):
        model = make_model(make_args(preset))
        for name, p in model.named_parameters():
            if p.dim() == 2:
                std = residual if name.endswith(("wo.weight", "w2.weight")) else 0.02
                # 4096 to 6144 draws: 1.1 %; five times that.
                assert p.std().item() == pytest.approx(std, rel=0.055), name
            elif name.endswith("norm.weight"):
                assert (p == (2**-0.5 if preset == "fog_max" else 1.0)).all(), name


@pytest.mark.parametrize("preset", PRESETS)
def test_init_weights_fills_all_and_repeats(preset, make_args, make_model):
    """make_model poisons everything with NaN first; FP8 state counts too."""
    fp8 = Fp8(recipe="delayed", attention="full", amax_history=4)
    first, again, other = (make_model(make_args(preset), seed, fp8) for seed in (0, 0, 1))
    for name, tensor in (*first.named_parameters(), *first.named_buffers()):
        assert tensor.isfinite().all() and (tensor.is_floating_point() or (tensor >= 0).all()), name
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dim() == 1 or not torch.equal(a, c), name
    for (name, a), b in zip(first.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_tied_embeddings_are_one_parameter(make_args, make_model, tokens):
    tied, untied = (make_model(make_args(tie_embeddings=tie)) for tie in (True, False))
    count = {model: sum(p.numel() for p in model.parameters()) for model in (tied, untied)}
    assert count[untied] - count[tied] == 96 * 64
    assert tied.output is None and not any("output" in name for name in tied.state_dict())
    # Token 95 is never read, so its row gets a gradient from the head alone; untied it gets none.
    tokens = tokens.clamp(max=94)
    for model in (tied, untied):
        model(tokens).square().mean().backward()
    assert tied.tok_embeddings.weight.grad[95].abs().sum() > 0
    assert untied.tok_embeddings.weight.grad[95].abs().sum() == 0


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_that_of_the_logits(make_args, make_model, tokens, tied):
    """The same GEMMs in float32, the softmax's sums in another order: agreement to a few roundings. An activation's slope is
    one number, the sum of thousands of either sign, so its roundings are those of larger numbers."""
    labels = tokens.roll(-1, 1).masked_fill(tokens % 5 == 0, IGNORE_INDEX)
    plain, ours = (make_model(make_args(tie_embeddings=tied)) for _ in range(2))
    expected = F.cross_entropy(plain(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    loss = ours(tokens, labels)
    assert loss.shape == () and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    loss.backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        tolerance = 1e-3 if p.numel() == 1 else 1e-5
        assert (p.grad - q.grad).norm() < tolerance * q.grad.norm(), name


# ---- Invariants ----


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("activation", ["xielu", "gelu", "swiglu", "smooth_swiglu"])
def test_every_parameter_gets_a_finite_gradient(preset, activation, make_args, make_model, tokens):
    model = make_model(make_args(preset, activation=activation))
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(math.log(96), abs=0.5)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fp8", [False, True])
def test_no_token_sees_a_later_one(preset, fp8, make_args, make_model, tokens):
    """Bit for bit. In FP8 only once scales come from earlier steps: the first step's come from the whole batch."""
    recipe = Fp8(recipe="delayed", attention="full", amax_history=4) if fp8 else None
    model = make_model(make_args(preset), fp8=recipe)
    if fp8:
        model(tokens).sum().backward()
        scaling_state(model).update()
    model.eval()
    with torch.no_grad():
        before = model(tokens)
        for position in (1, 9, 15):
            changed = tokens.clone()
            changed[:, position] = (changed[:, position] + 1) % 96
            after = model(changed)
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position], before[:, position])
            shorter = model(tokens[:, :8])
            torch.testing.assert_close(shorter, before[:, :8], rtol=0.1 if fp8 else 1e-4, atol=1e-5)


def test_under_autocast_the_residual_stream_is_bfloat16(make_args, make_model, tokens):
    model = make_model(make_args("fog_max"))
    exact = model(tokens)
    dtypes = []
    for block in model.layers.values():
        block.register_forward_hook(lambda _, inputs, output: dtypes.extend((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    assert dtypes == [torch.bfloat16] * 4 and logits.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: 0.4 % per rounding, a dozen roundings in a row that do not add up in one direction.
    assert (logits - exact).norm() / exact.norm() < 0.02
    logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_all_gemms_are_where_convert_looks(make_args):
    """convert swaps nn.Linear and `inner_attention`; there must be no product of trained matrices besides these."""
    for preset in PRESETS:
        with torch.device("meta"):
            model = Decoder(make_args(preset))
        block = model.layers["0"]
        matrices = {name for name, p in block.named_parameters() if p.dim() > 1}
        linears = {f"{name}.weight" for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        assert matrices == linears and len(linears) == (7 if preset == "llama" else 6)
        assert isinstance(block.attention.inner_attention, CausalAttention)
