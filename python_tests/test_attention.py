"""Attention against PyTorch's own, dense masks, and its laws: causality, packing, bits."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import gmkernels
from gmkernels import attention_logsumexp, causal_attention, dispatch, full_attention
from gmkernels.spec import filled


def heads(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return filled(shape, dtype, "cpu", seed)


def triple(b: int, h: int, t: int, d: int, kv_heads: int = 0, keys: int = -1) -> list[Tensor]:
    shape = (b, kv_heads or h, t if keys < 0 else keys, d)
    return [heads(b, h, t, d), heads(*shape, seed=1), heads(*shape, seed=2)]


def gradients(function, xs: list[Tensor], **options) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in xs]
    out = function(*leaves, **options)
    weight = heads(*out.shape, seed=9).to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, leaves, weight))


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """By SDPA's math path in float64; 0 where nothing is seen."""
    with sdpa_kernel(SDPBackend.MATH):
        o = F.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1]
        )
    return torch.where(seen.any(-1, keepdim=True), o, 0.0)


def places(t: int, keys: int) -> Tensor:
    """How far each key lies behind the place of each query; negative ahead of it."""
    return torch.arange(t)[:, None] + keys - t - torch.arange(keys)


@pytest.mark.parametrize("width", [16, 40, 64, 100, 128, 256])
@pytest.mark.parametrize("t", [1, 63, 64, 65, 97, 384])
def test_native_equals_math_path(t: int, width: int, isas: list[str]):
    xs = triple(1, 2, t, width)
    want = gradients(lambda q, k, v: dense(q, k, v, places(t, t) >= 0), xs)
    for isa in isas:
        with dispatch.use_isa(isa):
            for a, b in zip(gradients(causal_attention, xs, backend="native"), want, strict=True):
                torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("t", [31, 200])
def test_native_equals_flash_in_16_bits(t: int, dtype: torch.dtype, isas: list[str]):
    xs = [x.to(dtype) for x in triple(2, 2, t, 64)]
    truth = gradients(lambda q, k, v: dense(q, k, v, places(t, t) >= 0), [x.double() for x in xs])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = gradients(lambda *a: F.scaled_dot_product_attention(*a, is_causal=True), xs)
    for isa in isas:
        with dispatch.use_isa(isa):
            ours = gradients(causal_attention, xs, backend="native")
        for a, b, c in zip(ours, flash, truth, strict=True):
            ulp = torch.finfo(dtype).eps * c.abs().max()
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 2 * ulp, isa


@pytest.mark.parametrize("keys", [5, 40, 130])
@pytest.mark.parametrize("window", [None, 1, 7, 64])
def test_window_groups_and_alignment_equal_a_dense_mask(keys, window, backend):
    xs = triple(2, 4, 40, 24, kv_heads=2, keys=keys)
    behind = places(40, keys)
    seen = (behind >= 0) & (behind < (window or keys + 40))
    want = gradients(lambda q, k, v: dense(q, k, v, seen), xs)
    got = gradients(causal_attention, xs, window=window, backend=backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_equal_each_alone(causal, backend):
    lengths = [1, 30, 0, 67, 2]
    xs = triple(1, 2, sum(lengths), 16)
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    function = causal_attention if causal else full_attention
    got = gradients(function, xs, cu_seqlens=cuts, backend=backend)
    parts = [[x[:, :, a:b] for x in xs] for a, b in itertools.pairwise(cuts)]
    want = function(*parts[3], backend=backend)
    torch.testing.assert_close(got[0][:, :, 31:98], want, rtol=2e-6, atol=2e-6)
    one = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    seen = one[:, None] == one
    seen = seen & (places(100, 100) >= 0) if causal else seen
    for a, b in zip(got, gradients(lambda *x: dense(*x, seen), xs), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5)


def test_key_mask_equals_a_dense_mask(backend):
    xs = triple(3, 2, 20, 16, keys=130)
    seen = torch.rand(3, 130, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[1] = torch.arange(130) < 70
    seen[2] = False
    every = seen[:, None, None].expand(3, 1, 20, 130)
    want = gradients(lambda *x: dense(*x, every), xs)
    got = gradients(full_attention, xs, key_mask=seen, backend=backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.nan_to_num().double(), rtol=2e-5, atol=2e-5)
    assert not got[0][2].any()
    assert (
        attention_logsumexp(*xs[:2], causal=False, key_mask=seen, backend=backend)[2]
        .eq(-math.inf)
        .all()
    )


def test_jacobian_is_causal(backend):
    q, k, v = (x.squeeze(0).squeeze(0) for x in triple(1, 1, 9, 8))

    def call(*xs: Tensor) -> Tensor:
        return causal_attention(*(x[None, None] for x in xs), backend=backend)[0, 0]

    for jacobian in torch.autograd.functional.jacobian(call, (q, k, v)):
        blocks = jacobian.abs().sum((1, 3))  # [query, token]
        assert blocks.triu(1).eq(0).all()
        assert blocks.tril().sum() > 0


@pytest.mark.parametrize("t", [70, 200])
def test_future_tokens_change_no_bit(t, backend):
    xs = triple(1, 2, t, 16)
    changed = [x.clone() for x in xs]
    cut = t // 2
    for x in changed:
        x[:, :, cut:] = 3.0 - 7.0 * x[:, :, cut:]
    a, b = (causal_attention(*x, backend=backend)[:, :, :cut] for x in (xs, changed))
    if backend == "reference":
        torch.testing.assert_close(a, b)  # PyTorch's products depend on their shape alone, nearly
    else:
        assert torch.equal(a, b)


def test_bits_do_not_depend_on_threads_or_runs(isas):
    for shape in ((1, 1, 700, 64), (1, 4, 130, 40), (3, 2, 90, 32)):
        xs = triple(*shape, kv_heads=1)
        for isa in isas:
            found = []
            for threads in (1, 2, 2, 3):
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                try:
                    with dispatch.use_isa(isa):
                        found.append(gradients(causal_attention, xs, backend="native"))
                finally:
                    torch.set_num_threads(before)
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_strides_cost_no_copy_and_change_no_bit():
    joined = heads(2, 50, 3 * 4 * 16)
    views = [x.unflatten(2, (4, 16)).transpose(1, 2) for x in joined.chunk(3, 2)]
    got = gradients(causal_attention, views, backend="native")
    want = gradients(causal_attention, [x.contiguous() for x in views], backend="native")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    odd = heads(1, 2, 20, 33).bfloat16()[..., :32]  # rows of 33: pairs of bfloat16 straddle words
    assert torch.equal(causal_attention(odd, odd, odd), causal_attention(*[odd.contiguous()] * 3))


def test_logsumexp_joins_attentions_over_parts(backend):
    q, k, v = triple(1, 2, 10, 16, keys=50)
    whole = full_attention(q, k, v, backend=backend)
    parts = [(k[:, :, :20], v[:, :, :20]), (k[:, :, 20:], v[:, :, 20:])]
    lse = torch.stack(
        [attention_logsumexp(q, key, causal=False, backend=backend) for key, _ in parts]
    )
    outs = torch.stack([full_attention(q, *part, backend=backend) for part in parts])
    joined = (lse.softmax(0)[..., None] * outs).sum(0)
    torch.testing.assert_close(joined, whole, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        lse.logsumexp(0), attention_logsumexp(q, k, causal=False, backend=backend)
    )


def test_equal_scores_average_values(backend):
    v = heads(1, 1, 5, 4)
    o = causal_attention(torch.zeros(1, 1, 5, 4), heads(1, 1, 5, 4, seed=1), v, backend=backend)
    torch.testing.assert_close(o[0, 0], v[0, 0].cumsum(0) / torch.arange(1, 6)[:, None])


def test_infinite_softcap_is_none_and_a_small_one_flattens():
    q, k, v = triple(1, 2, 30, 16)
    none = causal_attention(q, k, v)
    torch.testing.assert_close(causal_attention(q, k, v, softcap=1e4), none, rtol=1e-4, atol=1e-4)
    flat = causal_attention(q, k, v, softcap=1e-6)
    want = v.cumsum(2) / torch.arange(1, 31)[:, None]
    torch.testing.assert_close(flat, want, rtol=1e-4, atol=1e-5)


def test_batch_rows_and_heads_stand_alone(backend):
    q, k, v = triple(3, 4, 70, 16, kv_heads=2)
    whole = causal_attention(q, k, v, backend=backend)
    alone = causal_attention(q[1:2, 2:4], k[1:2, 1:2], v[1:2, 1:2], backend=backend)
    if backend == "reference":
        torch.testing.assert_close(whole[1:2, 2:4], alone)
    else:
        assert torch.equal(whole[1:2, 2:4], alone)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"q": torch.zeros(3, 5, 8)}, ValueError, r"q must have shape \[B, H, T, D\]"),
        ({"k": torch.zeros(1, 3, 5, 8)}, ValueError, "q's heads must be a multiple of those of k"),
        ({"k": torch.zeros(2, 2, 5, 8)}, ValueError, "same batch and width"),
        ({"k": torch.zeros(1, 2, 5, 9)}, ValueError, "same batch and width"),
        ({"v": torch.zeros(1, 2, 6, 8)}, ValueError, "v must have k's shape"),
        ({"k": torch.zeros(1, 2, 5, 8, device="meta")}, ValueError, "k must be on cpu"),
        ({"q": torch.zeros(1, 4, 5, 8, dtype=torch.int64)}, TypeError, "q must be float32"),
        ({"window": 0}, ValueError, "window must be a whole number >= 1"),
        ({"window": 2.0}, ValueError, "window must be a whole number >= 1"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be an int64"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, ValueError, r"a vector of S \+ 1 offsets"),
        ({"cu_seqlens": torch.tensor([0, 4])}, RuntimeError, "end with the number of tokens 5"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 5])}, RuntimeError, "would have length -2"),
        ({"cu_seqlens": torch.tensor([0, 9, 5])}, RuntimeError, "must never decrease"),
    ],
)
def test_refusals(change, kind, words):
    given = {"q": torch.zeros(1, 4, 5, 8), "k": torch.zeros(1, 2, 5, 8)}
    given |= {"v": torch.zeros(1, 2, 5, 8)} | change
    with pytest.raises(kind, match=f"attention.*{words}"):
        causal_attention(**given)


def test_refusals_of_full_attention_and_logsumexp():
    x = torch.zeros(2, 1, 5, 8)
    for mask, kind in ((torch.ones(2, 5), TypeError), (torch.ones(2, 4) > 0, ValueError)):
        with pytest.raises(kind, match="full_attention: key_mask must"):
            full_attention(x, x, x, key_mask=mask)
    with pytest.raises(ValueError, match="packed sequences lie one after another"):
        full_attention(x, x, x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="a window looks back"):
        attention_logsumexp(x, x, causal=False, window=3)
    wide = torch.zeros(1, 1, 2, 257)
    with pytest.raises(ValueError, match=r"D must lie in \[1, 256\], got 257"):
        full_attention(wide, wide, wide)
    with pytest.raises(RuntimeError, match="float64 runs on the reference backend only"):
        full_attention(x.double(), x, x, backend="native")


def test_explain_names_the_backend():
    x = torch.zeros(1, 1, 5, 8)
    assert "attention on cpu: native" in gmkernels.explain(causal_attention, x, x, x)
