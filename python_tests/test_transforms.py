"""torch.compile, torch.export, torch.func, forward-mode AD, checkpointing: the numbers of eager."""

import pytest
import torch
from test_ops import SEED, as_tuple, leaves, outputs_and_gradients, with_noise
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import gmkernels
from gmkernels import noise, registry, reparameterize_kl

ROWS = [op for op in registry.rows() if op.differentiable]
# Sizes alone are traced alike: of those kinds the odd one stands for all.
SIZES = ("one", "block-1", "block", "block+1", "large")
TRACED_CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in ROWS
    for case in op.cases
    if case.kind not in SIZES
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 4, 5, generator=generator).unbind()
    return mean.clone().requires_grad_(), logvar.clone().requires_grad_()


def loss(mean, logvar, **options):
    z, kl = reparameterize_kl(mean, logvar, **({"seed": SEED} | options))
    return z.square().sum() + kl.square().sum()


def penalty(mean, logvar):
    found = torch.autograd.grad(loss(mean, logvar), [mean, logvar], create_graph=True)
    return sum(g.square().sum() for g in found)


def compiled_equals_eager(op, case, compiler, tolerance=0.0):
    given = op.inputs(case, torch.float32, "cpu", 3)
    function = torch.compile(op.function, fullgraph=True, backend=compiler)
    want = outputs_and_gradients(op.function, with_noise(op, leaves(given), False), False)
    got = outputs_and_gradients(function, with_noise(op, leaves(given), False), False)
    for a, b in zip(got[0] + tuple(got[1]), want[0] + tuple(want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("op", "case"), TRACED_CASES)
def test_compiled_fullgraph(op, case):
    compiled_equals_eager(op, case, "aot_eager")


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in ROWS])
def test_compiled_by_inductor(op):
    # Of the contrastive losses inductor compiles plain PyTorch, too: sums in an order of its own.
    tolerance = 1e-6 if op.operator == "contrastive" else 0.0
    compiled_equals_eager(op, op.case("odd"), "inductor", tolerance)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_shapes_change(dynamic):
    function = torch.compile(
        lambda m, l: reparameterize_kl(m, l, seed=3),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    for shape in ((4, 5), (7, 9), (2, 1025)):
        m, l = torch.randn(shape), torch.randn(shape)
        for a, b in zip(function(m, l), reparameterize_kl(m, l, seed=3), strict=True):
            assert torch.equal(a, b)


def test_compiled_draws_a_new_seed_each_call(pair):
    function = torch.compile(
        lambda m, l: reparameterize_kl(m, l)[0], fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(5)
    one, two = function(*pair), function(*pair)
    torch.manual_seed(5)
    again = function(*pair)
    assert not torch.equal(one, two)
    assert torch.equal(one, again)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_gradient_penalty_inside_compile(pair, compiler, monkeypatch):
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch cannot trace torch.autograd.grad")
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    want = torch.autograd.grad(penalty(*pair), pair)
    got = torch.autograd.grad(torch.compile(penalty, fullgraph=True, backend=compiler)(*pair), pair)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().min() > 0


def test_penalty_agrees_with_the_reference(pair):
    want = torch.autograd.grad(penalty(*pair), pair)
    with gmkernels.use_backend("reference"):
        reference = torch.autograd.grad(penalty(*pair), pair)
    for a, b in zip(want, reference, strict=True):
        torch.testing.assert_close(a, b)


def test_third_derivatives(pair):
    mean, logvar = pair
    (first,) = torch.autograd.grad(loss(mean, logvar), logvar, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logvar, create_graph=True)
    (third,) = torch.autograd.grad(second.square().sum(), logvar)
    with gmkernels.use_backend("reference"):
        (first,) = torch.autograd.grad(loss(mean, logvar), logvar, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), logvar, create_graph=True)
        (want,) = torch.autograd.grad(second.square().sum(), logvar)
    torch.testing.assert_close(third, want, rtol=1e-4, atol=1e-4)
    assert third.abs().max() > 0


def test_one_tensor_given_twice():
    x = torch.randn(3, 4, requires_grad=True)
    (g,) = torch.autograd.grad(loss(x, x), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x)
    with gmkernels.use_backend("reference"):
        (g2,) = torch.autograd.grad(loss(x, x), x, create_graph=True)
        (h2,) = torch.autograd.grad(g2.square().sum(), x)
    torch.testing.assert_close(g, g2)
    torch.testing.assert_close(h, h2)


def test_export(pair):
    class Step(torch.nn.Module):
        def forward(self, mean, logvar):
            return reparameterize_kl(mean, logvar, seed=SEED)

    args = tuple(x.detach() for x in pair)
    exported = torch.export.export(Step(), args).module()
    for a, b in zip(exported(*args), Step()(*args), strict=True):
        assert torch.equal(a, b)


def test_func_grad_jvp_jacrev_hessian(pair):
    mean, logvar = (x.detach() for x in pair)
    want = torch.autograd.grad(loss(*pair), pair)
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1))(mean, logvar), want, strict=True):
        torch.testing.assert_close(a, b)
    ones = (torch.ones_like(mean), torch.ones_like(logvar))
    torch.testing.assert_close(
        torch.func.jvp(loss, (mean, logvar), ones)[1], sum(g.sum() for g in want)
    )
    jacobian = torch.func.jacrev(lambda l: reparameterize_kl(mean, l, seed=SEED)[1])(logvar)
    expected = torch.zeros(4, 4, 5)
    expected[range(4), range(4)] = 0.5 * torch.expm1(logvar)
    torch.testing.assert_close(jacobian, expected)
    hessian = torch.func.hessian(lambda m: loss(m, logvar))(mean)
    assert hessian.shape == (4, 5, 4, 5)
    torch.testing.assert_close(hessian, hessian.permute(2, 3, 0, 1))


def test_func_grad_inside_compile_wants_the_reference(pair):
    mean, logvar = (x.detach() for x in pair)

    def step(backend):
        return torch.compile(
            lambda m, l: torch.func.grad(loss)(m, l, backend=backend),
            fullgraph=True,
            backend="aot_eager",
        )

    with pytest.raises(RuntimeError):  # loud: a registered operator has no rule for torch.func here
        step(None)(mean, logvar)
    torch._dynamo.reset()
    want = torch.autograd.grad(loss(*pair), pair[0])[0]
    torch.testing.assert_close(step("reference")(mean, logvar), want)


def test_forward_mode(pair):
    mean, logvar = (x.detach() for x in pair)
    with forward_ad.dual_level():
        dual = loss(
            forward_ad.make_dual(mean, torch.ones_like(mean)),
            forward_ad.make_dual(logvar, torch.ones_like(logvar)),
        )
        tangent = forward_ad.unpack_dual(dual).tangent
    want = torch.autograd.grad(loss(*pair), pair)
    torch.testing.assert_close(tangent, sum(g.sum() for g in want))


def test_vmap():
    mean, logvar, eps = torch.randn(3, 6, 4, 5).unbind()
    with pytest.raises(
        RuntimeError, match="under vmap one seed would give every example the same noise"
    ):
        torch.vmap(lambda m, l: reparameterize_kl(m, l, seed=1)[0])(mean, logvar)
    with pytest.raises(RuntimeError, match="under vmap one seed"):
        torch.vmap(lambda m, l: reparameterize_kl(m, l)[0])(mean, logvar)
    got = torch.vmap(lambda m, l, e: reparameterize_kl(m, l, eps=e)[0])(mean, logvar, eps)
    torch.testing.assert_close(got, reparameterize_kl(mean, logvar, eps=eps)[0])
    seeds = torch.arange(6)
    got = torch.vmap(lambda m, l, s: reparameterize_kl(m, l, seed=s)[0])(mean, logvar, seeds)
    want = torch.stack(
        [reparameterize_kl(mean[i], logvar[i], seed=i, backend="reference")[0] for i in range(6)]
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("seed", [None, SEED])
def test_compiled_activation_checkpointing(pair, compiler, seed):
    mean, logvar = pair

    def body(m, l):
        z, kl = reparameterize_kl(m, l, seed=seed)
        return (z * z.detach()).sum() + kl.sum()

    def step(m, l):
        return checkpoint(body, m, l, use_reentrant=False)

    value = torch.compile(step, fullgraph=True, backend=compiler)(mean, logvar)
    dmean, dlogvar = torch.autograd.grad(value, pair)
    z = (dmean - mean).detach()  # dz = z, so dmean = z + mean: backward's noise is forward's
    torch.testing.assert_close(value, z.square().sum() + gmkernels.gaussian_kl(mean, logvar).sum())
    torch.testing.assert_close(dlogvar, 0.5 * (z * (z - mean) + logvar.exp() - 1))


def test_eager_checkpointing(pair):
    def body(m, l):
        return as_tuple(reparameterize_kl(m, l))[0].square().sum()

    torch.manual_seed(1)
    want = torch.autograd.grad(body(*pair), pair)
    torch.manual_seed(1)
    got = torch.autograd.grad(checkpoint(body, *pair, use_reentrant=False), pair)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_backward_keeps_the_backend_of_forward(pair):
    with gmkernels.use_backend("reference"):
        value = loss(*pair)
    assert "reparameterize_kl" not in str(value.grad_fn.next_functions)
    value = loss(*pair, backend="native")
    with gmkernels.use_backend("reference"):
        got = torch.autograd.grad(value, pair)
    for a, b in zip(got, torch.autograd.grad(loss(*pair), pair), strict=True):
        assert torch.equal(a, b)


def test_noise_equals_the_op_of_its_own(pair):
    mean, logvar = (x.detach() for x in pair)
    key = noise.fold_in(noise.key(3, offset=2), 5)
    z, _ = reparameterize_kl(mean, logvar, seed=key, offset=1)
    eps = gmkernels.normal(mean.shape, seed=key, offset=1)
    assert torch.equal(z, reparameterize_kl(mean, logvar, eps=eps)[0])
