"""Decoding with a cache against causal attention, and its laws: what is read, and bits."""

import math

import pytest
import torch
from torch import Tensor

import gmkernels
from gmkernels import causal_attention, decode_attention, dispatch
from gmkernels.spec import filled

PARTS = {"native": 1024, "triton": 256}  # keys of a part


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return filled(shape, dtype, "cpu", seed)


def call(
    b: int, h: int, keys: int, d: int, new: int = 1, kv_heads: int = 0, dtype=torch.float32
) -> list[Tensor]:
    cache = (b, kv_heads or h, keys, d)
    q = drawn(b, h, new, d, dtype=dtype)
    return [q, drawn(*cache, dtype=dtype, seed=1), drawn(*cache, dtype=dtype, seed=2)]


def poisoned(cache: Tensor, lengths: Tensor, first: int = 0) -> Tensor:
    """The cache with NaN at and beyond the lengths, and before `first`."""
    j = torch.arange(cache.shape[2])
    hidden = (j >= lengths[:, None]) | (j < first)
    return cache.masked_fill(hidden[:, None, :, None], math.nan)


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 0.8, "scale": 0.3}], ids=str)
@pytest.mark.parametrize(("new", "kv_heads"), [(1, 4), (1, 1), (3, 2)])
def test_ragged_rows_equal_causal_attention(new, kv_heads, options, backend):
    lengths = torch.tensor([530, 17, 3, 512])
    q, k, v = call(4, 4, 530, 24, new, kv_heads)
    whole = drawn(4, 4, 530, 24, seed=3)  # queries of every token, the last ones q's
    for b, n in enumerate(lengths):
        whole[b, :, n - new : n] = q[b]
    got = decode_attention(
        q, poisoned(k, lengths), poisoned(v, lengths), lengths, backend=backend, **options
    )
    for b, n in enumerate(lengths):
        row = (x[b : b + 1, :, :n].double() for x in (whole, k, v))
        want = causal_attention(*row, **options)[:, :, -new:]
        torch.testing.assert_close(got[b : b + 1].double(), want, rtol=2e-6, atol=2e-6)


def test_one_token_at_a_time_equals_all_at_once(backend):
    q, k, v = call(2, 2, 6, 16, new=6)
    want = causal_attention(q, k, v, backend=backend)
    k_cache, v_cache = torch.full_like(k, math.nan), torch.full_like(v, math.nan)
    for n in range(6):
        k_cache[:, :, n], v_cache[:, :, n] = k[:, :, n], v[:, :, n]
        lengths = torch.full((2,), n + 1)
        got = decode_attention(q[:, :, n : n + 1], k_cache, v_cache, lengths, backend=backend)
        torch.testing.assert_close(got[:, :, 0], want[:, :, n], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_what_no_query_sees_is_not_read(kv_heads, backend):
    q, k, v = call(2, 4, 530, 16, kv_heads=kv_heads)
    lengths = torch.tensor([400, 257])
    clean = decode_attention(q, k, v, lengths, window=100, backend=backend)
    hidden = [poisoned(x, lengths, first=157) for x in (k, v)]
    assert torch.equal(decode_attention(q, *hidden, lengths, window=100, backend=backend), clean)
    leaves = [x.requires_grad_() for x in (q, *hidden)]
    out = decode_attention(*leaves, lengths, window=100, backend=backend)
    dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
    assert dq.isfinite().all()
    for gradient in (dk, dv):
        assert gradient.isfinite().all()
        assert not gradient[0, :, 400:].any()
        assert not gradient[:, :, :157].any()
        assert gradient[0, :, 300:400].any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_bits_of_a_row_are_its_own(dtype, kv_heads, backend, isas):
    if backend == "reference":
        pytest.skip("PyTorch's products depend on their shape")
    part = PARTS[backend]
    lengths = torch.tensor([part + 200, 9, part])
    q, k, v = call(3, 4, 2 * part + 9, 32, kv_heads=kv_heads, dtype=dtype)
    want = decode_attention(q, k, v, lengths, backend=backend)
    for b, n in enumerate(lengths):  # alone, at a capacity that just holds it, of one layout
        row = [x[b : b + 1, :, :n].contiguous() for x in (k, v)]
        alone = decode_attention(q[b : b + 1], *row, lengths[b : b + 1], backend=backend)
        assert torch.equal(alone, want[b : b + 1])
    if backend != "native":
        return
    for isa in isas:
        with dispatch.use_isa(isa):
            found = []
            for threads in (1, 2, 3):
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                try:
                    found.append(decode_attention(q, k, v, lengths, backend=backend))
                finally:
                    torch.set_num_threads(before)
            assert all(torch.equal(x, found[0]) for x in found[1:])


def test_queries_that_share_keys_have_the_bits_of_one_alone():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (24, 64):
            q, k, v = call(1, 2, 500, width, new=3, kv_heads=1, dtype=dtype)
            want = decode_attention(q, k, v, torch.tensor([500]), backend="native")
            for i in range(3):
                one = decode_attention(
                    q[:, 1:, i : i + 1], k, v, torch.tensor([498 + i]), backend="native"
                )
                assert torch.equal(one, want[:, 1:, i : i + 1])


def test_strides_are_read_in_place(backend):
    slots = drawn(2, 70, 2, 2, 32, seed=1)  # [B, S, k or v, H, D]
    k, v = (slots[:, :, n].transpose(1, 2) for n in range(2))
    q, lengths = drawn(2, 2, 1, 32), torch.tensor([70, 33])
    want = decode_attention(q, k.contiguous(), v.contiguous(), lengths, backend=backend)
    torch.testing.assert_close(decode_attention(q, k, v, lengths, backend=backend), want)


@pytest.mark.parametrize("lengths", [(0, 5), (-7, 12), (1, 2**40)])
def test_lengths_are_clamped_and_none_gives_zero(lengths, backend):
    q, k, v = call(2, 2, 12, 16)
    inside = torch.tensor(lengths).clamp(0, 12)
    got = decode_attention(q, k, v, torch.tensor(lengths), backend=backend)
    assert torch.equal(got, decode_attention(q, k, v, inside, backend=backend))
    for b, n in enumerate(inside):
        assert got[b].eq(0).all() == (n == 0)


def test_queries_before_the_first_token_are_zero(backend):
    q, k, v = call(1, 2, 12, 16, new=5)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = decode_attention(*leaves, torch.tensor([2]), backend=backend)
    assert not out[:, :, :3].any()
    torch.testing.assert_close(out[:, :, 3], v[:, :, 0])
    dq, _, _ = torch.autograd.grad(out.square().sum(), leaves)
    assert not dq[:, :, :3].any()


def test_hidden_infinite_scores_weigh_nothing(backend):
    q, k, v = call(1, 1, 20, 16)
    k[:, :, 4] = -math.inf * q[:, :, 0].sign()
    keep = torch.arange(20) != 4
    want = causal_attention(q, k[:, :, keep], v[:, :, keep])
    got = decode_attention(q, k, v, torch.tensor([20]), backend=backend)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_compiled_with_other_lengths_and_one_graph(backend):
    if backend == "triton":
        pytest.skip("test_ops.py compiles it")
    q, k, v = call(2, 2, 12, 16)
    compiled = torch.compile(decode_attention, backend="aot_eager", fullgraph=True)
    for lengths in (torch.tensor([12, 3]), torch.tensor([1, 9])):
        want = decode_attention(q, k, v, lengths, backend=backend)
        assert torch.equal(compiled(q, k, v, lengths, backend=backend), want)


ZERO = torch.zeros(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"q": torch.zeros(2, 4, 8)}, ValueError, r"q must have shape \[B, H, T, D\]"),
        ({"k_cache": ZERO[0]}, ValueError, r"k_cache must have shape \[B, H_kv, S, D\]"),
        ({"k_cache": ZERO[:, :1]}, ValueError, "v_cache must have k_cache's shape"),
        ({"v_cache": ZERO.half()}, TypeError, "the caches must have one dtype"),
        (
            {"q": torch.zeros(2, 3, 1, 8)},
            ValueError,
            "must be a multiple of those of the caches",
        ),
        ({"q": torch.zeros(1, 4, 1, 8)}, ValueError, "same batch and width"),
        ({"q": torch.zeros(2, 4, 1, 9)}, ValueError, "same batch and width"),
        ({"q": torch.zeros(2, 4, 1, 8).int()}, TypeError, "q must be float32"),
        ({"k_cache": ZERO.to("meta")}, ValueError, "k_cache must be on cpu"),
        ({"lengths": 5}, TypeError, "lengths must be an int64 or int32 tensor, got int"),
        ({"lengths": torch.ones(2)}, TypeError, "lengths must be an int64 or int32 tensor"),
        ({"lengths": torch.tensor(5)}, ValueError, r"lengths must have shape \[B\] = \(2,\)"),
        ({"lengths": torch.tensor([5, 5, 5])}, ValueError, r"lengths must have shape \[B\]"),
        ({"window": 0}, ValueError, "window must be a whole number >= 1"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"scale": math.inf}, ValueError, "scale must be a finite number"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_refusals(change, kind, words):
    given = {"q": torch.zeros(2, 4, 1, 8), "k_cache": ZERO, "v_cache": ZERO}
    given |= {"lengths": torch.tensor([5, 2])} | change
    with pytest.raises(kind, match=f"decode_attention: .*{words}"):
        decode_attention(**given)


def test_float64_and_wide_heads_are_refused_by_name():
    with pytest.raises(RuntimeError, match="float64 runs on the reference backend only"):
        decode_attention(ZERO.double(), ZERO, ZERO, torch.tensor([5, 5]), backend="native")
    wide = torch.zeros(1, 1, 2, 257)
    with pytest.raises(ValueError, match=r"D must lie in \[1, 256\], got 257"):
        decode_attention(wide, wide, wide, torch.tensor([2]))


def test_explain_names_the_backend():
    q, k, v = call(1, 1, 5, 8)
    text = gmkernels.explain(decode_attention, q, k, v, torch.tensor([5]))
    assert "decode_attention on cpu: native" in text
