"""Probes: when they look, two tensors as one, attention's rows."""

from __future__ import annotations

import pytest
import torch

from titan_fp8.float8.kernels.moments import ELEMENTS, SQUARES, reference
from titan_fp8.probe import QUERIES, Observer, Site, attention_sums

B, S, N = 3, 40, 96


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Outliers in some channels, so that fourth powers span ten decades."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x[..., ::7] *= 300
    return x.bfloat16()


@pytest.mark.parametrize(("seq_len", "heads", "groups"), [(16, 4, 4), (200, 4, 2)])
def test_attention_rows(seq_len, heads, groups):
    """float32 logits of 32 products: each within 32 2^-24 of its size, 30; the entropy moves by twice that at most."""
    torch.manual_seed(0)
    q, k = (2 * torch.randn(2, seq_len, n, 32).bfloat16() for n in (heads, groups))
    scale = 0.25
    largest, entropy, rows = attention_sums(q, k, scale).tolist()
    wide = k.double().repeat_interleave(heads // groups, 2)
    logits = torch.einsum("bqhc,bkhc->bhqk", q.double(), wide) * scale
    logits = logits.masked_fill(torch.ones(seq_len, seq_len).triu(1).bool(), -torch.inf)
    count = min(QUERIES, seq_len)
    at = [(i + 1) * seq_len // count - 1 for i in range(count)]
    assert len(set(at)) == count and at[-1] == seq_len - 1
    logits = logits[:, :, at]
    p = logits.softmax(-1)
    expected = -(p * p.clamp(min=1e-300).log()).sum(-1)
    assert rows == 2 * heads * count == expected.numel()
    assert largest == pytest.approx(float(logits.max()), abs=1e-4)
    assert entropy / rows == pytest.approx(float(expected.mean()), abs=1e-4)


def test_a_site_looks_only_when_told():
    observer = Observer()
    site = Site(observer)
    site.make_room(B, torch.device("cpu"))
    x = heavy(B, S, N).requires_grad_()
    assert site(x) is x and not site.sums.any()
    observer.on = True
    assert site(x) is x and torch.equal(site.sums, reference(x, B)[:, None])
    before = site.sums.clone()
    site(x)  # again, as activation checkpointing does
    assert torch.equal(site.sums, before)
    site.sums.zero_()
    site.eval()
    assert site(x) is x and not site.sums.any()
    assert not site.state_dict()


def test_a_pair_is_one_tensor():
    observer = Observer()
    site = Site(observer)
    site.make_room(B, torch.device("cpu"))
    observer.on = True
    h = heavy(B, S, 2 * N)
    h[1, 2, 3] = torch.nan
    for _ in range(2):  # the second time as the first
        site.pair(*h.chunk(2, -1))
        whole = reference(h, B)[:, None]
        torch.testing.assert_close(site.sums, whole, rtol=1e-5, atol=1e-5 * float(whole[..., SQUARES].max()))
        assert torch.equal(site.sums[..., ELEMENTS:], whole[..., ELEMENTS:])


@pytest.mark.gpu
def test_attention_rows_on_a_gpu_are_the_cpus():
    """Products of bfloat16 are exact in float32; 128 of them are added in another order."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 512, heads, 128).bfloat16() for heads in (8, 2))
    k[0, 3, 1, 7] = torch.nan
    expected = attention_sums(q, k, 0.09)
    for run in (attention_sums, torch.compile(attention_sums, fullgraph=True)):
        largest, entropy, rows = run(q.cuda(), k.cuda(), 0.09).tolist()
        assert largest == pytest.approx(float(expected[0]), abs=1e-4) and rows == expected[2]
        assert entropy / rows == pytest.approx(float(expected[1]) / rows, abs=1e-4)
