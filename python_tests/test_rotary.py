"""Rotary positions and rms_norm: laws, transformers' formulas written out, refusals."""

import math

import pytest
import torch

import gmkernels
from gmkernels import dispatch
from gmkernels.spec import filled

F64 = torch.float64


def test_table_is_rounded_once():
    """At the last of 100,000 places too, where float32 angles would be off by 0.004."""
    cos, sin = gmkernels.rotary_table(100_001, 64, base=500000.0)
    assert cos.shape == sin.shape == (100_001, 32)
    for n in (0, 1, 4097, 100_000):
        for i in (0, 1, 17, 31):
            angle = n * 500000.0 ** (-i / 32)
            assert cos[n, i].item() == pytest.approx(math.cos(angle), abs=6e-8)
            assert sin[n, i].item() == pytest.approx(math.sin(angle), abs=6e-8)


def test_by_hand(backend, device):
    """A quarter turn takes (a, b) to (-b, a)."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=device).view(1, 1, 1, 5)
    cos, sin = torch.zeros(1, 2, device=device), torch.ones(1, 2, device=device)
    halves = gmkernels.rotary_embedding(x, cos, sin, backend=backend)
    assert halves.flatten().tolist() == [-3.0, -4.0, 1.0, 2.0, 5.0]
    neighbours = gmkernels.rotary_embedding(x, cos, sin, interleaved=True, backend=backend)
    assert neighbours.flatten().tolist() == [-2.0, 1.0, -4.0, 3.0, 5.0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_the_distance_alone(interleaved, backend, device):
    q, k = (filled((1, 1, 1, 20), torch.float32, device, seed) for seed in (1, 2))
    cos, sin = gmkernels.rotary_table(200, 16, base=50.0, device=device)

    def product(m: int, n: int) -> float:
        turned = [
            gmkernels.rotary_embedding(
                x,
                cos,
                sin,
                positions=torch.tensor([place], device=device),
                interleaved=interleaved,
                backend=backend,
            )
            for x, place in ((q, m), (k, n))
        ]
        return (turned[0].double() * turned[1].double()).sum().item()

    for distance in (0, 3, 50):
        at_start = product(distance, 0)
        assert product(distance + 7, 7) == pytest.approx(at_start, abs=1e-5)
        assert product(distance + 149, 149) == pytest.approx(at_start, abs=1e-5)
    assert abs(product(3, 0) - product(0, 3)) > 1e-3  # and on its sign


def test_rotation_keeps_norms_and_turns_back(backend, device):
    x = filled((2, 3, 9, 24), torch.float32, device, 1)
    cos, sin = gmkernels.rotary_table(9, 24, device=device)
    y = gmkernels.rotary_embedding(x, cos, sin, backend=backend)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(gmkernels.rotary_embedding(y, cos, -sin, backend=backend), x)
    assert torch.equal(y[:, :, 0], x[:, :, 0])


def test_halves_are_llamas():
    """apply_rotary_pos_emb of transformers' Llama, written out."""
    x, cos, sin = filled((2, 3, 6, 16), F64, "cpu", 1), *gmkernels.rotary_table(6, 16)
    c, s = (torch.cat([t, t], -1).double() for t in (cos, sin))
    rotated = torch.cat([-x[..., 8:], x[..., :8]], -1)
    torch.testing.assert_close(gmkernels.rotary_embedding(x, cos, sin), x * c + rotated * s)


def test_neighbours_are_complex_products():
    """RoFormer's own form: pairs as complex numbers times exp(i n theta)."""
    x, cos, sin = filled((2, 3, 6, 16), F64, "cpu", 1), *gmkernels.rotary_table(6, 16)
    z = torch.view_as_complex(x.unflatten(-1, (8, 2))) * torch.complex(cos.double(), sin.double())
    expected = torch.view_as_real(z).flatten(-2)
    got = gmkernels.rotary_embedding(x, cos, sin, interleaved=True)
    torch.testing.assert_close(got, expected)


def test_positions_are_those_of_each_token(backend, device):
    x = filled((2, 3, 4, 10), torch.float32, device, 1)
    cos, sin = gmkernels.rotary_table(50, 10, device=device)
    places = torch.tensor([[5, 6, 7, 8], [40, 0, 49, 3]], device=device)
    got = gmkernels.rotary_embedding(x, cos, sin, positions=places, backend=backend)
    for b in range(2):
        for t in range(4):
            n = int(places[b, t])
            one = x[b : b + 1, :, t : t + 1]
            alone = gmkernels.rotary_embedding(one, cos[n : n + 1], sin[n : n + 1], backend=backend)
            assert torch.equal(got[b : b + 1, :, t : t + 1], alone)
    shared = gmkernels.rotary_embedding(x, cos, sin, positions=places[1], backend=backend)
    assert torch.equal(shared[1], got[1])


@pytest.mark.parametrize("place", [-1, 5])
def test_places_outside_the_table(place, backend, device):
    x, (cos, sin) = torch.ones(1, 1, 1, 4, device=device), gmkernels.rotary_table(5, 4)
    cos, sin = cos.to(device), sin.to(device)
    call = {"positions": torch.tensor([place], device=device), "backend": backend}
    if backend == "triton":
        assert gmkernels.rotary_embedding(x, cos, sin, **call).isnan().all()
    elif device == "cpu":
        with pytest.raises((IndexError, RuntimeError)):
            gmkernels.rotary_embedding(x, cos, sin, **call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs(dtype, backend, device):
    x, weight = filled((4, 3, 70), dtype, device, 1), filled((70,), torch.float32, device, 2)
    got = gmkernels.rms_norm(x, weight, eps=1e-5, backend=backend)
    truth = torch.nn.functional.rms_norm(x.double(), (70,), weight.double(), 1e-5)
    torch.testing.assert_close(got, truth.to(dtype))


def test_rms_norm_does_not_see_the_scale(backend, device):
    x = filled((5, 33), torch.float32, device, 1)
    y = gmkernels.rms_norm(x, eps=0.0, backend=backend)
    torch.testing.assert_close(gmkernels.rms_norm(x * 1e8, eps=0.0, backend=backend), y)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(5, device=device))


def test_gradient_of_a_weight_over_many_rows(device):
    """Summed in groups of rows: the same on each thread count, and right to float32."""
    x = filled((3, 7, 501, 16), torch.float32, device, 1)
    weight = torch.ones(16, device=device, requires_grad=True)
    dy = filled(tuple(x.shape), torch.float32, device, 2)
    gmkernels.rms_norm(x, weight).backward(dy)
    wide = torch.ones(16, dtype=F64, device=device, requires_grad=True)
    gmkernels.rms_norm(x.double(), wide).backward(dy.double())
    torch.testing.assert_close(weight.grad.double(), wide.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["rotary_embedding", "rms_norm"])
def test_strided_heads_are_read_in_place(name):
    """A third of a projection is no copy: the native kernel sees its strides."""
    q = torch.zeros(2, 5, 3 * 4 * 8).chunk(3, 2)[1].unflatten(2, (4, 8)).transpose(1, 2)
    assert not q.is_contiguous()
    seen = []
    kernel = dispatch.kernel(name, "native")
    table = dispatch._TABLE[name]
    replaced = dispatch.Kernel(
        kernel.devices, lambda x, *rest: (seen.append(x), kernel.forward(x, *rest))[1], None
    )
    table["native"] = replaced
    try:
        args = gmkernels.rotary_table(5, 8) if name == "rotary_embedding" else ()
        getattr(gmkernels, name)(q, *args, backend="native")
    finally:
        table["native"] = kernel
    assert seen[0].data_ptr() == q.data_ptr()


X, COS, SIN = torch.zeros(2, 3, 4, 8), *gmkernels.rotary_table(9, 6)
LONG = torch.int64


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "\\[B, H, T, D\\]", lambda: gmkernels.rotary_embedding(X[0], COS, SIN)),
        (ValueError, "2 M", lambda: gmkernels.rotary_embedding(X[..., :5], COS, SIN)),
        (ValueError, "same shape", lambda: gmkernels.rotary_embedding(X, COS, SIN[:, :2])),
        (ValueError, "places", lambda: gmkernels.rotary_embedding(X, COS[:3], SIN[:3])),
        (
            ValueError,
            "constant",
            lambda: gmkernels.rotary_embedding(X, COS.clone().requires_grad_(), SIN),
        ),
        (
            TypeError,
            "int64",
            lambda: gmkernels.rotary_embedding(X, COS, SIN, positions=torch.zeros(4)),
        ),
        (
            ValueError,
            "\\[T\\]",
            lambda: gmkernels.rotary_embedding(X, COS, SIN, positions=torch.zeros(3, dtype=LONG)),
        ),
        (RuntimeError, "float64", lambda: _native(X.double())),
        (ValueError, "even", lambda: gmkernels.rotary_table(4, 5)),
        (ValueError, "length", lambda: gmkernels.rotary_table(-1, 4)),
        (ValueError, "base", lambda: gmkernels.rotary_table(4, 4, base=0.0)),
        (ValueError, "D >= 1", lambda: gmkernels.rms_norm(torch.zeros(3, 0))),
        (ValueError, "\\[D\\]", lambda: gmkernels.rms_norm(X, torch.ones(7))),
        (ValueError, "eps", lambda: gmkernels.rms_norm(X, eps=-1.0)),
        (TypeError, "float32", lambda: gmkernels.rms_norm(torch.ones(3, dtype=LONG))),
    ],
)
def test_refusals(error, words, call):
    with pytest.raises(error, match=words):
        call()


def _native(x: torch.Tensor) -> torch.Tensor:
    return gmkernels.rotary_embedding(x, COS, SIN, backend="native")
