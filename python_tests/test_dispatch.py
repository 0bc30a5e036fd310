"""The choice of a backend, what explain() and info say, and what bad input gets."""

import subprocess
import sys

import pytest
import torch

import gmkernels
from gmkernels import dispatch
from gmkernels.ops.gaussian import gaussian_kl, gaussian_kl_per_dim, reparameterize_kl
from gmkernels.ops.likelihood import bernoulli_nll, categorical_nll, gaussian_nll

PAIRS = [reparameterize_kl, gaussian_kl, gaussian_kl_per_dim, gaussian_nll, bernoulli_nll]
X = torch.zeros(3, 4)


def named(functions):
    return [pytest.param(f, id=f.__name__) for f in functions]


def test_explain_names_the_choice_and_the_reasons():
    text = gmkernels.explain(reparameterize_kl, X, X, seed=0)
    assert text.startswith("reparameterize_kl on cpu: native\n  native: runs this call")
    text = gmkernels.explain(reparameterize_kl, X.double(), X.double(), seed=0)
    assert "reparameterize_kl on cpu: reference" in text
    assert "native: float64 runs on the reference backend only" in text
    text = gmkernels.explain(gaussian_kl, X, X, backend="reference")
    assert "native: backend 'reference' was asked for" in text
    with pytest.raises(ValueError, match="is not an op of gmkernels"):
        gmkernels.explain(torch.add, X, X)


def test_use_backend_nests_and_restores():
    assert "cpu: native" in gmkernels.explain(gaussian_kl, X, X)
    with gmkernels.use_backend("reference"):
        assert "cpu: reference" in gmkernels.explain(gaussian_kl, X, X)
        with gmkernels.use_backend("native"):
            assert "cpu: native" in gmkernels.explain(gaussian_kl, X, X)
        assert "cpu: reference" in gmkernels.explain(gaussian_kl, X, X)
        assert "cpu: native" in gmkernels.explain(gaussian_kl, X, X, backend="native")
    with pytest.raises(ZeroDivisionError), gmkernels.use_backend("reference"):
        raise ZeroDivisionError
    assert "cpu: native" in gmkernels.explain(gaussian_kl, X, X)


def test_unknown_and_unusable_backends():
    with pytest.raises(
        ValueError, match="name must be one of native, triton, reference, got 'cuda'"
    ):
        gmkernels.use_backend("cuda")
    with pytest.raises(ValueError, match="backend must be one of native, triton, reference"):
        gaussian_kl(X, X, backend="fast")
    with pytest.raises(
        RuntimeError, match="'native' cannot run this call: float64 runs on the reference"
    ):
        gaussian_kl(X.double(), X.double(), backend="native")


def test_triton_says_how_to_run_on_a_cpu():
    code = (
        "import torch, gmkernels as g\n"
        "x = torch.zeros(2, 3)\n"
        "try: g.gaussian_kl(x, x, backend='triton')\n"
        "except RuntimeError as e: print(e)"
    )
    env = {"PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "set TRITON_INTERPRET=1 before Python starts" in found.stdout, found.stderr


def test_info_prints_the_table():
    found = subprocess.run(
        [sys.executable, "-m", "gmkernels.info"], capture_output=True, text=True, check=True
    )
    for word in ("torch", "isa", "reparameterize_kl", "native", "triton"):
        assert word in found.stdout


def test_reuse_memory_in_a_child():
    code = "import gmkernels; print(gmkernels.reuse_memory())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(sys.platform.startswith("linux"))


@pytest.mark.parametrize("function", named(PAIRS))
def test_refusals(function):
    name = function.__name__
    first, second = ("x", "logits") if function is bernoulli_nll else ("mean", "logvar")
    first, second = ("x", "mean") if function is gaussian_nll else (first, second)
    with pytest.raises(TypeError, match=f"{name}: {first} must be a tensor, got list"):
        function([1.0], X)
    with pytest.raises(
        TypeError, match=f"{name}: {first} must be float32, .* got torch.int64; cast"
    ):
        function(X.long(), X)
    with pytest.raises(
        TypeError, match=f"{name}: {second} must be float32, .* got torch.complex64"
    ):
        function(X, X.to(torch.complex64))
    with pytest.raises(
        TypeError, match=f"{name}: {first} must be a dense tensor, got layout torch.sparse"
    ):
        function(X.to_sparse(), X)
    with pytest.raises(
        ValueError, match=rf"{name}: {first} must have shape \[B, \*\] .* got \(4,\)"
    ):
        function(X[0], X[0])
    with pytest.raises(
        ValueError, match=rf"{name}: {second} must have {first}'s shape \(3, 4\), got \(4, 3\)"
    ):
        function(X, X.t())
    with pytest.raises(
        ValueError, match=f"{name}: {second} must be on cpu like the others, got meta"
    ):
        function(X, X.to("meta"))


def test_refusals_of_the_gaussians():
    with pytest.raises(
        ValueError, match=r"prior_mean must have mean's shape \(3, 4\), or one row of it"
    ):
        gaussian_kl(X, X, prior_mean=torch.zeros(5))
    with pytest.raises(ValueError, match=r"logvar_range must be \(low, high\) with low <= high"):
        gaussian_kl(X, X, logvar_range=(1.0, -1.0))
    with pytest.raises(ValueError, match="give eps or a seed, not both"):
        reparameterize_kl(X, X, eps=X, seed=1)
    with pytest.raises(ValueError, match="offset must be >= 0, got -1"):
        reparameterize_kl(X, X, seed=1, offset=-1)
    with pytest.raises(ValueError, match="eps must have mean's shape"):
        reparameterize_kl(X, X, eps=X[:2])


def test_refusals_of_the_likelihoods():
    levels = torch.zeros(3, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="logvar must have x's shape"):
        gaussian_nll(X, X, torch.zeros(3))
    with pytest.raises(TypeError, match="levels must be int64, int32 or uint8, got torch.float32"):
        categorical_nll(X, torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"logits must have levels' shape and one more dimension"):
        categorical_nll(levels, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="at least one level"):
        categorical_nll(levels, torch.zeros(3, 4, 0))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_level_outside_gives_nan_in_its_row(backend):
    logits = torch.zeros(3, 2, 4, requires_grad=True)
    levels = torch.tensor([[0, 1], [-1, 2], [3, 4]])
    nll = categorical_nll(levels, logits, backend=backend)
    assert nll.isnan().tolist() == [False, True, True]


def test_direct_calls_of_the_operators_never_crash():
    ops = torch.ops.gmkernels
    key = torch.tensor([1, 0])
    tail = (None, None, None, key, -1.0, 1.0)
    wide = torch.zeros(3, 8)
    cases = [
        ((X, X[:2], *tail), "logvar must have 3 rows of 4 elements"),
        ((X, wide[:, ::2], *tail), "logvar must be contiguous within a row"),
        ((X.long(), X, *tail), "mean must be float32"),
        ((X, X.double(), *tail), "logvar must be float32"),
        ((X, X, None, None, X, key, -1.0, 1.0), "exactly one of eps and key"),
        ((X, X, None, None, None, None, -1.0, 1.0), "exactly one of eps and key"),
        ((X, X, None, None, None, torch.tensor([1, -1]), -1.0, 1.0), "offset must be >= 0"),
        (
            (X, X, None, None, None, torch.tensor([1.0, 0.0]), -1.0, 1.0),
            "int64 tensor of two elements",
        ),
        ((X, X, None, None, None, torch.tensor([1]), -1.0, 1.0), "int64 tensor of two elements"),
        ((torch.zeros(()), torch.zeros(()), *tail), "must have a batch dimension"),
        ((X.to_sparse(), X, *tail), "(?i)sparse"),
    ]
    for args, message in cases:
        with pytest.raises((RuntimeError, NotImplementedError), match=message):
            ops.reparameterize_kl_forward(*args)
    with pytest.raises(RuntimeError, match="dkl must have shape"):
        ops.gaussian_kl_backward(torch.zeros(2), X, X, None, None, -1.0, 1.0, 3)
    with pytest.raises(RuntimeError, match="levels must be contiguous"):
        ops.categorical_nll_forward(torch.zeros(3, 4, 5), torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(RuntimeError, match="levels must be int64, int32 or uint8"):
        ops.categorical_nll_forward(torch.zeros(3, 4, 5), X)


def test_an_output_that_does_not_fit_names_its_size():
    row = torch.zeros(1, 1).expand(1 << 40, 64)
    with pytest.raises(
        RuntimeError, match=r"could not allocate an output of shape \(1099511627776"
    ):
        torch.ops.gmkernels.gaussian_kl_forward(row[:, :1], row[:, :1], None, None, 0.0, 1.0)


def test_devices_of_every_op_are_known():
    for row in dispatch._TABLE.values():
        for kernel in row.values():
            assert isinstance(kernel, str) or kernel.devices
