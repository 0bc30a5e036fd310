"""GPT: transformers' GPT-2 to the last digits, causality, the density of what it writes."""

import itertools
import math

import pytest
import torch

import gmkernels
from gmkernels import noise
from gmkernels.models import generation
from gmkernels.models.gpt import GPT, Sizes
from gmkernels.models.gpt2 import from_gpt2, to_gpt2

VARIANTS = {
    "gpt2": {},
    "llama": {"positions": "rotary", "norm": "rms", "kv_heads": 2, "bias": False, "tied": False},
    "norms": {"positions": "rotary", "qk_norm": True, "hidden": 24, "marks": 2, "kv_heads": 1},
}
VOCAB, CONTEXT = 11, 8


def model_of(variant="gpt2", dtype=torch.float64, **sizes):
    torch.manual_seed(0)
    given = {"vocab": VOCAB, "context": CONTEXT, "layers": 2, "heads": 4, "width": 32}
    model = GPT(Sizes(**{**given, **VARIANTS[variant], **sizes})).to(dtype).eval()
    for p in model.parameters():  # of any size: a new GPT says nearly nothing
        p.data.add_(torch.randn_like(p) * 0.3)
    return model


def tokens_of(*shape, seed=0, vocab=VOCAB):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def written_out(model, tokens):
    """The logits by the formulas, one head and one query at a time."""
    s, p = model.sizes, dict(model.named_parameters())
    d, groups = s.width // s.heads, s.heads // (s.kv_heads or s.heads)

    def norm(x, name, rms=s.norm == "rms"):
        weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias", 0.0)
        if rms:
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)

    def turned(x, t):
        angle = t * 10000.0 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
        turn = torch.polar(torch.ones_like(angle), angle) * torch.complex(*x.chunk(2))
        return torch.cat([turn.real, turn.imag])

    rotary, texts = s.positions == "rotary", []
    for row in tokens:
        h = p["token.weight"][row]
        h = h if rotary else h + p["position.weight"][: len(row)]
        for i in range(s.layers):
            name = f"layers.{i}"
            qkv = linear(norm(h, f"{name}.norm1"), f"{name}.qkv").unflatten(1, (-1, d))
            heads = []
            for head in range(s.heads):
                kept = (head, s.heads + head // groups, s.heads * (1 + 1 / groups) + head // groups)
                q, k, v = (qkv[:, int(j)] for j in kept)
                if s.qk_norm:
                    q, k = (norm(x, f"{name}.{n}_norm", True) for x, n in ((q, "q"), (k, "k")))
                if rotary:
                    q, k = (torch.stack([turned(y, t) for t, y in enumerate(x)]) for x in (q, k))
                o = [
                    ((q[t] @ k[: t + 1].T) / math.sqrt(d)).softmax(0) @ v[: t + 1]
                    for t in range(len(row))
                ]
                heads.append(torch.stack(o))
            h = h + linear(torch.cat(heads, 1), f"{name}.out")
            x = linear(norm(h, f"{name}.norm2"), f"{name}.up")
            x = 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
            h = h + linear(x, f"{name}.down")
        head = p["token.weight"][: s.vocab] if s.tied else p["head.weight"]
        texts.append(norm(h, "norm") @ head.T)
    return torch.stack(texts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_formulas(variant):
    model, tokens = model_of(variant), tokens_of(2, CONTEXT)
    # The table of angles is rounded to float32.
    torch.testing.assert_close(model(tokens), written_out(model, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inner", [None, 40])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(inner, tied):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=97,
        n_positions=24,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_inner=inner,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    ours = from_gpt2(theirs.state_dict(), 4).eval()
    assert ours.sizes.tied == tied
    tokens = tokens_of(3, 24, vocab=97)
    with torch.no_grad():
        logits = theirs(tokens).logits
        assert float((ours(tokens) - logits).abs().max()) < 1e-5
        prompt = tokens[:, :9]
        written = theirs.generate(
            prompt,
            max_new_tokens=15,
            do_sample=False,
            attention_mask=prompt >= 0,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert torch.equal(ours.generate(prompt, 15, temperature=0), written[:, 9:])
    back = to_gpt2(ours)
    assert theirs.load_state_dict(back).missing_keys == []
    assert torch.equal(theirs(tokens).logits, logits)
    if tied:  # a GPT2Model has no head, and no prefix
        bare = {n.removeprefix("transformer."): x for n, x in back.items() if n[:2] != "lm"}
        assert torch.equal(from_gpt2(bare, 4).eval()(tokens), ours(tokens))


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match="state must hold wte.weight"):
        from_gpt2({"a": tokens_of(3)}, 4)
    state = to_gpt2(model_of(layers=1))
    del state["transformer.h.0.attn.c_proj.bias"]
    with pytest.raises(RuntimeError, match="layers.0.out.bias"):
        from_gpt2(state, 4)
    with pytest.raises(ValueError, match="positions must be learned, got rotary"):
        to_gpt2(model_of("norms"))
    with pytest.raises(ValueError, match="kv_heads must be None or 4, got 2"):
        to_gpt2(model_of(kv_heads=2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_sees_a_later_one(variant):
    """Exact zeros of the Jacobian, equal bits under other futures, and the past is seen."""
    model, tokens = model_of(variant, torch.float32), tokens_of(2, CONTEXT)
    states = []
    hook = model.token.register_forward_hook(lambda *args: states.append(args[2]))
    logits = model(tokens)
    hook.remove()
    for t in range(CONTEXT):
        weights = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(t))
        (slope,) = torch.autograd.grad((logits[:, t] * weights).sum(), states[0], retain_graph=True)
        assert (slope[:, t + 1 :] == 0).all()
        assert (slope[:, : t + 1].abs().amax(2) > 0).all()
        other = torch.where(torch.arange(CONTEXT) > t, (tokens + 1) % VOCAB, tokens)
        assert torch.equal(model(other)[:, : t + 1], logits[:, : t + 1])


PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.arange(12) % 5, tokens_of(8)]


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.8, "top_k": 6, "top_p": 0.9}]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cache_changes_no_token(variant, options):
    """Each token from a whole pass over its window; ragged prompts, 15 tokens past the context."""
    model, key = model_of(variant), noise.key(3, 2)
    written = model.generate(PROMPTS, 15, seed=key, **options)
    assert written.shape == (4, 15)
    assert len(set(map(tuple, written.tolist()))) == 4
    for b, prompt in enumerate(PROMPTS):
        text = prompt
        for _ in range(15):
            logits = model(text[None, generation.window(len(text), CONTEXT) :])[:, -1]
            drawn = gmkernels.next_token(
                logits, seed=noise.key(key, b), position=len(text), **options
            )
            text = torch.cat([text, drawn])
        assert torch.equal(written[b], text[len(prompt) :])


def test_texts_do_not_depend_on_their_neighbours():
    model = model_of()
    together = model.generate(PROMPTS, 12, seed=5)
    alone = [model.generate([p], 12, seed=5, offset=b)[0] for b, p in enumerate(PROMPTS)]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(model.generate(PROMPTS[2:], 12, seed=noise.key(5, 2)), together[2:])
    assert not torch.equal(model.generate(PROMPTS, 12, seed=6), together)
    # A text that goes on from its own first tokens goes on as before.
    longer = [torch.cat([p, row[:5]]) for p, row in zip(PROMPTS, together, strict=True)]
    assert torch.equal(model.generate(longer, 7, seed=5), together[:, 5:])


def test_nothing_is_read_beyond_a_row():
    """A cache that holds NaN where it holds no token, and rows that are made anew."""
    model = model_of("llama")
    cache = generation.empty_cache(model, 3)
    cache.k.fill_(math.nan)
    cache.v.fill_(math.nan)
    pieces = [tokens_of(n, seed=n) for n in (5, 2, 7)]
    with torch.no_grad():
        generation.prefill(model, cache, pieces, [0, 1, 2])
        for row, piece in enumerate(pieces):
            cache.k[:, row, :, len(piece) :] = cache.v[:, row, :, len(piece) :] = math.nan
        generation.prefill(model, cache, [tokens_of(3, seed=9)], [2])
        assert cache.lengths.tolist() == [5, 2, 3]
        pieces[2] = tokens_of(3, seed=9)
        for token in (1, 2):
            logits = generation.step(model, torch.full((3,), token), cache)
            pieces = [torch.cat([p, torch.tensor([token])]) for p in pieces]
            for row, piece in enumerate(pieces):
                torch.testing.assert_close(logits[row], model(piece[None])[0, -1])


@pytest.mark.parametrize("context", [1, 2, 5])
def test_probabilities_sum_to_one(context):
    """Of all texts of 4 tokens of 3 after a mark, also past the context."""
    model = model_of(vocab=3, context=context, marks=1)
    texts = torch.tensor([(3, *text) for text in itertools.product(range(3), repeat=4)])
    log_p = model.log_prob(texts)
    assert log_p.dtype == torch.float64
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    rest = model.log_prob(texts, given=3).view(9, 9).exp().sum(1)
    torch.testing.assert_close(rest, torch.ones(9, dtype=torch.float64))
    first = model.log_prob(texts[:, :3]) + model.log_prob(texts, given=3)
    torch.testing.assert_close(first, log_p)


def test_frequencies_are_the_probabilities():
    """What generate() draws has the density log_prob(): chi-square, past the context."""
    model, n = model_of(vocab=3, context=2, marks=1, layers=1), 3000
    texts = torch.tensor([(3, *text) for text in itertools.product(range(3), repeat=3)])
    expected = model.log_prob(texts).detach().exp() * n
    drawn = model.sample(n, prompt=torch.tensor([3]), tokens=3, seed=1)
    assert drawn.shape == (n, 4)
    assert (drawn[:, 0] == 3).all()
    index = (drawn[:, 1:] * torch.tensor([9, 3, 1])).sum(1)
    counts = index.bincount(minlength=27)
    seen = expected > 5
    chi = ((counts - expected).square() / expected)[seen].sum()
    freedom = int(seen.sum()) - 1
    assert freedom > 8
    assert float(chi) < freedom + 4 * math.sqrt(2 * freedom)


def test_loss_is_the_mean_of_log_prob():
    model, x = model_of("norms"), tokens_of(3, CONTEXT + 1)
    loss = model.loss(x)
    torch.testing.assert_close(loss, -model.log_prob(x).mean() / CONTEXT)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_weights_begin_as_nanogpt():
    torch.manual_seed(0)
    model = GPT(Sizes(500, 64, layers=8, heads=2, width=128))
    for name, p in model.named_parameters():
        adds = name.endswith(("out.weight", "down.weight"))
        if p.dim() == 2:
            expected = 0.02 / 4 if adds else 0.02
            assert abs(float(p.detach().std()) / expected - 1) < 0.05, name
        else:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
    assert abs(float(model.loss(tokens_of(4, 65, vocab=500)).detach()) - math.log(500)) < 0.1


def test_dropout():
    model, x = model_of(dropout=0.5).train(), tokens_of(2, 5)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("context", [1, 2, 7, 64])
def test_windows(context):
    """At least half a context is seen, once there is one; starts never go back."""
    starts = [generation.window(n, context) for n in range(1, 5 * context)]
    assert starts == sorted(starts)
    for n, start in enumerate(starts, 1):
        assert n - start <= context
        assert n - start >= min(n, (context + 1) // 2)
        assert start == 0 or n > context


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab": 0}, "vocab, context, layers, heads and width must be >= 1"),
        ({"heads": 3}, "heads must divide width"),
        ({"kv_heads": 3}, "kv_heads must divide heads"),
        ({"hidden": 0}, "hidden must be >= 1, or None"),
        ({"marks": -1}, "marks must be >= 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"positions": "sine"}, "positions must be learned or rotary, got .*sine"),
        ({"norm": "batch"}, "norm must be layer or rms"),
        ({"positions": "rotary", "width": 12}, "rotary needs an even width / heads"),
    ],
)
def test_sizes_refuse(sizes, message):
    with pytest.raises(ValueError, match=message):
        model_of(**sizes)


def test_calls_refuse():
    model = model_of()
    with pytest.raises(ValueError, match=r"T at most the context 8, got \(1, 9\)"):
        model(tokens_of(1, 9))
    with pytest.raises(ValueError, match="given must be >= 1, got 0"):
        model.log_prob(tokens_of(1, 9), given=0)
    for prompts, n in (([], 3), ([tokens_of(0)], 3), (PROMPTS, 0)):
        with pytest.raises(ValueError, match="must hold 1 or more"):
            model.generate(prompts, n)


def test_compiled_loss_is_the_eager_one():
    model, x = model_of("llama", torch.float32, layers=1), tokens_of(2, CONTEXT + 1)
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model.loss(x))
