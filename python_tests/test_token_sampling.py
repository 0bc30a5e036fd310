"""next_token: its law, the sets that top-k and top-p keep, and that a token is its row's alone."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import gmkernels
from gmkernels import dispatch, registry
from gmkernels.ops.token_sampling import reference
from gmkernels.spec import filled

ROW = registry.row("next_token")
FAST = ("native", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter takes a second for two rows under top-k and top-p.
INTERPRETED_CASES = {"one", "infinite_and_nan", "block+1", "temperature_0", "position_of_each"}


@pytest.fixture(params=FAST)
def kernel(request: pytest.FixtureRequest, device: str) -> str:
    """Each backend that is not the reference; one that this device lacks is skipped."""
    reason = dispatch.why_not("next_token", request.param, device, False)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def kept_by_transformers(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper in turn, in float64."""
    scores = logits.double() / temperature
    scores = scores.masked_fill(scores < scores.topk(top_k)[0][..., -1, None], -math.inf)
    ordered, order = torch.sort(scores, descending=False)
    removed = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    removed[..., -1:] = False
    return ~removed.scatter(1, order, removed) & (scores > -math.inf)


def chi_square(tokens: Tensor, p: Tensor) -> float:
    """The statistic in deviations from its mean; cells of few expected tokens are joined."""
    counts = torch.bincount(tokens, minlength=len(p)).double()
    expected = p * len(tokens)
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert (counts[expected == 0] == 0).all(), "a token of probability 0 was drawn"
    seen = expected > 0
    statistic = ((counts - expected).square() / expected)[seen].sum().item()
    freedom = int(seen.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * max(freedom, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROW.cases, ids=lambda case: case.name)
def test_equals_the_reference(case, dtype, kernel, device):
    few = case.name in INTERPRETED_CASES and (dtype == torch.float32 or case.name == "block+1")
    if kernel == "triton" and device == "cpu" and not few:
        pytest.skip("the interpreter is slow: fewer cases")
    given = ROW.inputs(case, dtype, device, 3)
    got = ROW.function(*given.args, **given.kwargs, backend=kernel)
    assert got.dtype == torch.int64
    assert got.device == given.args[0].device
    assert torch.equal(got, ROW.function(*given.args, **given.kwargs, backend="reference"))


def test_triton_equals_the_reference_under_both_filters(device):
    if dispatch.why_not("next_token", "triton", device, False) is not None:
        pytest.skip("no Triton here")
    options = {"top_k": 40, "top_p": 0.7, "temperature": 0.7, "seed": 1}
    logits = filled((2, 2500), torch.float32, device, 1, scale=2.0)
    got = gmkernels.next_token(logits, backend="triton", **options)
    assert torch.equal(got, gmkernels.next_token(logits, backend="reference", **options))


@pytest.mark.parametrize("isa", ["portable", "v3", "v4"])
def test_every_object_and_thread_count_draws_the_same(isa, isas):
    if isa not in isas:
        pytest.skip("this CPU lacks it")
    logits = filled((40, 1500), torch.float32, "cpu", 5, scale=3.0)
    threads = torch.get_num_threads()
    for top_k, top_p in itertools.product((None, 1, 7, 1000), (None, 0.2, 0.99)):
        options = {"top_k": top_k, "top_p": top_p, "temperature": 0.9, "seed": 4}
        truth = gmkernels.next_token(logits, backend="reference", **options)
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                with dispatch.use_isa(isa):
                    got = gmkernels.next_token(logits, backend="native", **options)
                assert torch.equal(got, truth)
        finally:
            torch.set_num_threads(threads)


OPTIONS = (
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_p": 0.6},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_frequencies(options):
    n, logits = 200_000, filled((1, 40), torch.float32, "cpu", 2, scale=2.0)
    logits[0, 3] = -math.inf
    t, k, p = (options.get(o, d) for o, d in (("temperature", 1.0), ("top_k", 40), ("top_p", 1.0)))
    kept = kept_by_transformers(logits, t, k, p)
    law = (logits.double() / t).masked_fill(~kept, -math.inf).softmax(-1)[0]
    tokens = gmkernels.next_token(logits.expand(n, -1), seed=7, **options)
    assert set(tokens.unique().tolist()) <= set(kept[0].nonzero()[:, 0].tolist())
    assert chi_square(tokens, law) < 4


def test_frequencies_of_a_large_vocabulary():
    """Uniform over 4096 tokens: the noise's resolution would show."""
    tokens = gmkernels.next_token(torch.zeros(1, 4096).expand(60_000, -1), seed=3)
    law = torch.full((4096,), 1 / 4096, dtype=torch.float64)
    assert abs(chi_square(tokens, law)) < 4


def test_gumbel_noise_is_gumbel():
    """h against -2 ln(-ln(1 - u)) - 2 ln 2 in float64, at random words and at both ends."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, 1, 2, 1000, 2**31, 2**32 - 2, 2**32 - 1])
    words = torch.cat([ends, torch.randint(0, 2**32, (200_000,), generator=generator)])
    got = reference.gumbel(words).double()
    u = (words.double() + 0.5) * 2.0**-32
    truth = -2 * torch.log(-torch.log1p(-u)) - 2 * math.log(2)
    assert ((got - truth).abs() / (1 + truth.abs())).max() < 1e-6


def test_weights_are_the_exponential():
    d = torch.linspace(-30, 0, 100_001)
    truth = torch.exp(d.double()) * 2.0**33
    assert ((reference.weights(d) - truth).abs() <= 0.5 + 1.5e-7 * truth).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("top_k", "top_p"), [(300, 0.9), (300, 0.05), (20, 0.5), (7, 0.9999)])
def test_kept_set_is_that_of_transformers(seed, top_k, top_p):
    """In generic position (no ties) the filters agree token for token."""
    x = filled((6, 300), torch.float32, "cpu", seed, scale=2.5)
    d = (x - x.amax(1, keepdim=True)) * torch.tensor(1 / 0.8)
    share = round(top_p * 2**reference.SHARE_BITS)
    kept = reference.kept(x, d, top_k, share)
    assert torch.equal(kept, kept_by_transformers(x, 0.8, top_k, top_p))


def test_ties_are_kept_together():
    x = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]])
    d = x - 2.0
    assert reference.kept(x, d, 2, 0).tolist() == [[True, True, True, False, True]]
    share = round(0.5 * 2**reference.SHARE_BITS)  # the three together pass the half
    assert reference.kept(x, d, 0, share).tolist() == [[True, True, True, False, True]]
    drawn = gmkernels.next_token(x.expand(500, -1), top_k=2, seed=0, backend="native")
    assert set(drawn.tolist()) == {0, 1, 2, 4}


def test_rows_do_not_depend_on_neighbours_or_on_the_split(kernel, device):
    rows = 4 if kernel == "triton" and device == "cpu" else 30
    x = filled((rows, 70), torch.float32, device, 1)
    options = {"seed": 11, "position": 5, "temperature": 0.9, "backend": kernel}
    whole = gmkernels.next_token(x, **options)
    parts = [gmkernels.next_token(x[b : b + 1], offset=b, **options) for b in range(rows)]
    assert torch.equal(torch.cat(parts), whole)
    others = torch.cat([x[:2], x[2:].flip(1)])
    assert torch.equal(gmkernels.next_token(others, **options)[:2], whole[:2])


def test_ragged_positions_are_those_of_each_sequence_alone(kernel, device):
    x = filled((3, 70), torch.float32, device, 1)
    places = torch.tensor([0, 17, 2**40 + 3], device=device)
    together = gmkernels.next_token(x, seed=11, position=places, backend=kernel)
    for b, place in enumerate(places.tolist()):
        alone = gmkernels.next_token(x, seed=11, position=place, backend=kernel)
        assert together[b] == alone[b]


def test_position_folds_the_key():
    """The uniforms of a row are those of noise.uniform under the folded key."""
    key = gmkernels.noise.fold_in(gmkernels.noise.key(9, 4), 6)
    u = gmkernels.uniform((50, 300), seed=key).double()
    gumbel = -torch.log(-torch.log1p(-u))
    x = filled((50, 300), torch.float32, "cpu", 8)
    expected = (x.double() + gumbel).argmax(1)
    assert torch.equal(gmkernels.next_token(x, seed=9, offset=4, position=6), expected)


def test_positions_and_rows_are_independent():
    flat = torch.zeros(64, 1000)
    drawn = torch.stack([gmkernels.next_token(flat, seed=1, position=t) for t in range(64)])
    assert drawn.unique().numel() > 0.9 * 1000  # of 4096 draws from 1000
    assert not any(torch.equal(drawn[0], row) for row in drawn[1:])


def test_temperature_0_is_the_first_of_the_largest(backend, device):
    x = torch.tensor([[0.0, 3.0, 3.0], [5.0, 5.0, -1.0], [-math.inf, -2.0, -2.0]], device=device)
    got = gmkernels.next_token(x, temperature=0.0, backend=backend)
    assert got.tolist() == [1, 0, 1]


def test_rows_without_a_law_give_minus_one(backend, device):
    x = torch.zeros(4, 5, device=device)
    x[0, 2], x[1, 4], x[2] = math.nan, math.inf, -math.inf
    for temperature in (0.0, 1.0):
        got = gmkernels.next_token(x, temperature=temperature, seed=0, backend=backend)
        assert got[:3].tolist() == [-1, -1, -1]
        assert 0 <= got[3] < 5


def test_compiles_without_a_break():
    x = filled((4, 60), torch.float32, "cpu", 1)
    places = torch.arange(4)

    def draw(x: Tensor, places: Tensor, key: Tensor) -> Tensor:
        return gmkernels.next_token(x * 2, top_k=9, top_p=0.8, seed=key, position=places)

    key = gmkernels.noise.key(3)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, places, key), draw(x, places, key))


def test_opcheck(kernel, device):
    x = filled((3, 20), torch.float32, device, 1)
    args = (x, gmkernels.noise.key(3), torch.arange(3, device=device), 0.7, 0, 0)
    torch.library.opcheck(dispatch.kernel("next_token", kernel).forward, args)


def test_no_gradient_and_default_seed():
    x = torch.zeros(2, 1000, requires_grad=True)
    torch.manual_seed(0)
    first = gmkernels.next_token(x)
    assert not first.requires_grad
    second = gmkernels.next_token(x)
    torch.manual_seed(0)
    assert torch.equal(gmkernels.next_token(x), first)
    assert not torch.equal(first, second)


X = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("error", "words", "args", "options"),
    [
        (ValueError, "shape", (torch.zeros(2, 3, 5),), {}),
        (TypeError, "float32", (torch.zeros(2, 5, dtype=torch.int64),), {}),
        (TypeError, "tensor", ([[1.0]],), {}),
        (ValueError, "2\\^20", (torch.zeros(1, 1).expand(1, 2**20 + 1),), {}),
        (ValueError, "temperature", (X,), {"temperature": -1.0}),
        (ValueError, "temperature", (X,), {"temperature": 1e-9}),
        (ValueError, "temperature", (X,), {"temperature": math.nan}),
        (ValueError, "temperature", (X,), {"temperature": torch.ones(2)}),
        (ValueError, "top_k", (X,), {"top_k": 0}),
        (ValueError, "top_k", (X,), {"top_k": 2.0}),
        (ValueError, "top_p", (X,), {"top_p": 0.0}),
        (ValueError, "top_p", (X,), {"top_p": 1.1}),
        (ValueError, "position", (X,), {"position": -1}),
        (TypeError, "position", (X,), {"position": 1.0}),
        (TypeError, "int64", (X,), {"position": torch.zeros(2, dtype=torch.int32)}),
        (ValueError, "\\[B\\]", (X,), {"position": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, "seed or generator", (X,), {"seed": 1, "generator": torch.Generator()}),
        (RuntimeError, "float64", (X.double(),), {"backend": "native"}),
    ],
)
def test_refusals(error, words, args, options):
    with pytest.raises(error, match=words):
        gmkernels.next_token(*args, **options)


def test_vmap_is_refused():
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: gmkernels.next_token(x, seed=0))(torch.zeros(2, 3, 4))
