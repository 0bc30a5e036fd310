"""Every row on every backend, dtype and case against the float64 reference.

Bound: the largest error of an output may be twice that of eager PyTorch in the same dtype, plus the
row's floor in units of the last place of the output's scale.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

import gmkernels
from gmkernels import dispatch, registry
from gmkernels.spec import Case, Inputs, Op, filled

ROWS = [op for op in registry.rows() if op.differentiable]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 7
EVERY_CASE = [
    pytest.param(op, case, id=f"{op.name}-{case.name}") for op in ROWS for case in op.cases
]
EVERY_OP = [pytest.param(op, id=op.name) for op in ROWS]


def spare_interpreter(backend: str, device: str, case: Case, *kinds: str) -> None:
    """Skips what Triton's interpreter, 30 times slower than a kernel, would show no better: the
    dtype and the derivatives of every shape are tested on a GPU, where programs run side by side.
    """
    if backend == "triton" and device == "cpu" and case.kind not in kinds:
        pytest.skip(f"the interpreter takes the kinds {', '.join(kinds)} here, a GPU takes all")


def as_tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def with_noise(op: Op, given: Inputs, eager: bool) -> Inputs:
    return op.with_noise(given, SEED, eager)


def leaves(given: Inputs) -> Inputs:
    return given.map(lambda x: x.detach().requires_grad_())


def outputs_and_gradients(
    function, given: Inputs, second: bool, **options
) -> tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]:
    """Outputs, first and second derivatives under fixed cotangents."""
    tensors = [x for x in given.tensors() if x.requires_grad]
    outs = as_tuple(function(*given.args, **given.kwargs, **options))
    generator = torch.Generator().manual_seed(1)

    def draw(like: Tensor) -> Tensor:
        values = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return values.to(like.device, torch.bfloat16).to(
            like.dtype
        )  # the same number in each dtype

    cotangents = [draw(o).requires_grad_(second) for o in outs]
    # An output may not depend on any input: plain PyTorch then has no graph, we have zeros.
    pairs = [(o, c) for o, c in zip(outs, cotangents, strict=True) if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        tensors,
        [c for _, c in pairs],
        create_graph=second,
        allow_unused=True,
    )
    firsts = [torch.zeros_like(x) if f is None else f for f, x in zip(found, tensors, strict=True)]
    if not second:
        return outs, firsts, []
    weighed = [(f, draw(f)) for f in firsts]
    found = torch.autograd.grad(
        [f for f, _ in weighed if f.requires_grad],
        [*tensors, *cotangents],
        [w for f, w in weighed if f.requires_grad],
        allow_unused=True,
    )
    every = zip(found, [*tensors, *cotangents], strict=True)
    return outs, firsts, [torch.zeros_like(x) if f is None else f for f, x in every]


def worst(x: Tensor, truth: Tensor) -> float:
    """Largest absolute error; infinities and NaN must stand where the truth has them."""
    x = x.detach().double()
    same = (x == truth) | (x.isnan() & truth.isnan())
    gap = torch.where(same, 0.0, (x - truth).abs())
    return gap.nan_to_num(nan=float("inf")).max().item() if gap.numel() else 0.0


def scale_of(truth: Tensor) -> float:
    finite = truth.detach()[truth.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


Three = tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]


def truth_and_eager(
    op: Op, case: Case, dtype: torch.dtype, device: str, second: bool, seed: int
) -> tuple[Inputs, Three, Three]:
    """Inputs of a case, what the float64 reference gives on them, and what eager PyTorch does."""
    given = op.inputs(case, dtype, device, seed)
    wide = with_noise(op, leaves(given.map(Tensor.double)), False)
    truth = outputs_and_gradients(op.function, wide, second, backend="reference")
    eager = outputs_and_gradients(op.eager, with_noise(op, leaves(given), True), second)
    return given, truth, eager


def flat(results: Three) -> dict[str, Tensor]:
    kinds = zip(("output", "gradient", "second"), results, strict=True)
    return {f"{kind} {i}": x for kind, found in kinds for i, x in enumerate(found)}


def compare(
    op: Op, case: Case, dtype: torch.dtype, device: str, backend: str, second: bool
) -> None:
    given, truth, eager = truth_and_eager(op, case, dtype, device, second, 3)
    got = outputs_and_gradients(
        op.function, with_noise(op, leaves(given), False), second, backend=backend
    )
    truths, eagers = flat(truth), flat(eager)
    allowed = {name: worst(eagers[name], t) / (scale_of(t) or 1.0) for name, t in truths.items()}
    drawn = 1
    for name, x in flat(got).items():
        t, scale = truths[name], scale_of(truths[name])
        assert x.shape == t.shape, f"{name}: shape {tuple(x.shape)}, not {tuple(t.shape)}"
        error, floor = worst(x, t), op.floor[0] * torch.finfo(x.dtype).eps * scale
        while error > 2 * allowed[name] * (scale or 1.0) + floor and drawn < op.draws[0]:
            _, further, others = truth_and_eager(op, case, dtype, device, second, 3 + 10 * drawn)
            for other, e in flat(others).items():
                of = flat(further)[other]
                allowed[other] = max(allowed[other], worst(e, of) / (scale_of(of) or 1.0))
            drawn += 1
        bound = 2 * allowed[name] * (scale or 1.0) + floor
        assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e}, scale {scale:.3e}"
    for x, gradient in zip(given.tensors(), got[1], strict=True):
        assert gradient.dtype == x.dtype
        assert gradient.device == x.device


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("op", "case"), EVERY_CASE)
def test_values_and_gradients(op, case, dtype, backend, device):
    if dtype == torch.bfloat16:
        spare_interpreter(backend, device, case, "odd", "mixed", "keyword")
    elif dtype == torch.float16:
        spare_interpreter(backend, device, case, "odd")
    compare(op, case, dtype, device, backend, second=False)


@pytest.mark.parametrize(("op", "case"), EVERY_CASE)
def test_second_derivatives(op, case, backend, device):
    spare_interpreter(backend, device, case, "odd")  # the reference's formula on every backend
    if case.kind in ("large", "block", "block-1", "block+1"):
        case = Case(case.name, case.kind, (*(min(n, 9) for n in case.shape),), case.options)
    compare(op, case, torch.float32, device, backend, second=True)


@pytest.mark.parametrize(("op", "case"), EVERY_CASE)
def test_reference_gradcheck(op, case, device):
    if case.kind in ("large", "block", "block-1", "block+1", "boundary"):
        pytest.skip(
            "shapes too large for finite differences, or points where the formula has a corner"
        )
    given = leaves(op.inputs(case, torch.float64, device, 3).map(Tensor.double))
    if not all(x.numel() for x in given.tensors()):
        pytest.skip("nothing to differentiate")
    given = with_noise(op, given, False)
    tensors = given.tensors()

    def call(*xs: Tensor):
        found = iter(xs)
        changed = given.map(lambda _: next(found))
        return op.function(*changed.args, **changed.kwargs)

    small = sum(x.numel() for x in tensors) < 50
    assert torch.autograd.gradcheck(call, tensors, fast_mode=not small)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize(("op", "case"), EVERY_CASE)
def test_equal_bits_on_two_runs(op, case, backend, device):
    spare_interpreter(backend, device, case, "odd")  # it runs programs in order
    given = op.inputs(case, torch.float32, device, 3)
    runs = [
        outputs_and_gradients(
            op.function, with_noise(op, leaves(given), False), False, backend=backend
        )
        for _ in range(2)
    ]
    for a, b in zip(*(run[0] + tuple(run[1]) for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", EVERY_OP)
def test_every_object_and_thread_count_agrees(op, isas, device):
    if device != "cpu":
        pytest.skip("instruction sets are the CPU's")
    given = op.inputs(op.case("odd"), torch.float32, device, 3)
    threads = torch.get_num_threads()
    found = []
    try:
        for isa in isas:
            for count in (1, 2):
                torch.set_num_threads(count)
                with dispatch.use_isa(isa):
                    call = with_noise(op, leaves(given), False)
                    found.append(
                        (isa, outputs_and_gradients(op.function, call, False, backend="native"))
                    )
    finally:
        torch.set_num_threads(threads)
    for (isa, one), (_, two) in zip(found[::2], found[1::2], strict=True):
        for a, b in zip(one[0] + tuple(one[1]), two[0] + tuple(two[1]), strict=True):
            assert torch.equal(a, b), f"{isa}: one and two threads differ"
    for isa, run in found[2:]:
        for a, b in zip(
            run[0] + tuple(run[1]), found[0][1][0] + tuple(found[0][1][1]), strict=True
        ):
            tolerance = 2e-6 if op.draws[0] == 1 else 1e-4  # where single errors are magnified
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, msg=lambda m, isa=isa: f"{isa}: {m}"
            )


@pytest.mark.parametrize("op", EVERY_OP)
def test_all_outputs_are_written(op, backend, device):
    # Deterministic mode fills fresh memory with NaN: what a kernel forgets shows.
    given = op.inputs(op.case("odd"), torch.float32, device, 3)
    torch.use_deterministic_algorithms(True)
    try:
        call = with_noise(op, leaves(given), False)
        outs, firsts, _ = outputs_and_gradients(op.function, call, False, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for x in (*outs, *firsts):
        assert not x.isnan().any()


@pytest.mark.parametrize("op", EVERY_OP)
def test_rows_do_not_depend_on_neighbours(op, backend, device):
    given = op.inputs(op.case("odd"), torch.float32, device, 3)
    if op.mixes_rows:
        pytest.skip(op.mixes_rows)

    def cut(x):
        return x[2:4].contiguous() if isinstance(x, Tensor) and x.shape[:1] == (5,) else x

    part = Inputs(tuple(map(cut, given.args)), {k: cut(v) for k, v in given.kwargs.items()})
    extra = {"seed": SEED} if op.noisy else {}
    whole = as_tuple(op.function(*given.args, **given.kwargs, **extra, backend=backend))
    if op.noisy:
        extra["offset"] = 2
    some = as_tuple(op.function(*part.args, **part.kwargs, **extra, backend=backend))
    for a, b in zip(whole, some, strict=True):
        assert torch.equal(a[2:4], b)


NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("op", EVERY_OP)
def test_not_finite_values_stay_in_their_row(op, value, backend, device):
    if op.mixes_rows:
        pytest.skip(op.mixes_rows)
    given = op.inputs(op.case("odd"), torch.float32, device, 3)
    bad = given.map(lambda x: x.clone())
    for x in bad.tensors():
        x[1, 2] = value
    extra = {"seed": SEED} if op.noisy else {}
    clean = as_tuple(op.function(*given.args, **given.kwargs, **extra, backend=backend))
    found = as_tuple(op.function(*bad.args, **bad.kwargs, **extra, backend=backend))
    keep = torch.arange(5) != 1
    for a, b in zip(clean, found, strict=True):
        assert torch.equal(a[keep], b[keep])
    assert any(not b[1].isfinite().all() for b in found)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_not_finite_values_stay_in_their_dimension(value, backend, device):
    clean = filled((5, 37), torch.float32, device, 3)
    bad = clean.clone()
    bad[1, 2] = value
    a, b = (gmkernels.gaussian_kl_per_dim(x, x, backend=backend) for x in (clean, bad))
    columns = torch.arange(37) != 2
    assert torch.equal(a[columns], b[columns])
    assert not b[2].isfinite()


@pytest.mark.parametrize(("op", "case"), EVERY_CASE)
def test_layout_of_outputs(op, case, backend, device):
    spare_interpreter(backend, device, case, "odd", "empty", "channels_last", "non_contiguous")
    given = op.inputs(case, torch.float32, device, 3)
    extra = {"seed": SEED} if op.noisy and "eps" not in given.kwargs else {}
    outs = as_tuple(op.function(*given.args, **given.kwargs, **extra, backend=backend))
    first = given.args[0]
    for out in outs:
        assert out.device == first.device
        if out.shape == first.shape and case.options.get("layout") == "channels_last":
            assert out.is_contiguous(memory_format=torch.channels_last)
        else:
            assert out.is_contiguous()


@pytest.mark.parametrize(
    "op", list({op.operator: op for op in ROWS}.values()), ids=lambda op: op.name
)
def test_opcheck(op, backend, device, monkeypatch):
    if backend == "reference":
        pytest.skip("plain PyTorch")
    case = next(c for c in op.cases if c.kind == "odd")
    calls = operator_calls(op, case, device, backend, monkeypatch)
    assert [operator for operator, _ in calls] == [
        getattr(dispatch.kernel(op.operator, backend), part) for part in ("forward", "backward")
    ]
    for operator, args in calls:
        torch.library.opcheck(operator, args)


def operator_calls(op: Op, case: Case, device: str, backend: str, monkeypatch):
    """(operator, arguments) of the registered operators that a call and its backward make."""
    calls = []
    given = leaves(op.inputs(case, torch.float32, device, 3))
    kernel = dispatch.kernel(op.operator, backend)

    def recording(operator):
        def call(*args):
            # As leaves: opcheck differentiates with respect to every input that asks for it.
            calls.append((operator, tuple(_as_leaf(x) for x in args)))
            return operator(*args)

        return call

    recorded = dataclasses.replace(
        kernel, forward=recording(kernel.forward), backward=recording(kernel.backward)
    )
    monkeypatch.setitem(dispatch._TABLE[op.operator], backend, recorded)
    outputs_and_gradients(op.function, with_noise(op, given, False), False, backend=backend)
    monkeypatch.undo()
    return calls


def _as_leaf(x):
    if isinstance(x, Tensor):
        return x.detach().clone().requires_grad_(x.requires_grad)
    return x


def test_every_backend_has_the_same_schema():
    def schema(space: str, name: str) -> str:
        text = str(getattr(getattr(torch.ops, space), name).default._schema).split("::")[1]
        return text.replace("SymInt", "int").replace("float", "f")

    for op in ROWS:
        for part in ("forward", "backward"):
            texts = {
                schema(space, f"{op.operator}_{part}") for space in dispatch.NAMESPACES.values()
            }
            assert len(texts) == 1, texts


@pytest.mark.parametrize("scale", [0.3, 1e-2, 1e-4])
def test_kl_near_the_prior_keeps_its_digits(scale, backend, device):
    if backend == "reference":
        pytest.skip("expm1(l) - l in float32 cancels there; float64 is the truth")
    given = filled((4, 100), torch.float32, device, 5, scale=scale)
    zero = torch.zeros_like(given)
    truth = gmkernels.gaussian_kl(zero.double(), given.double())
    got = gmkernels.gaussian_kl(zero, given, backend=backend)
    torch.testing.assert_close(got.double(), truth, rtol=5e-7, atol=0)
