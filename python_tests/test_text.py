"""Text as a condition: bytes and padding, what the encoder may and may not see, captions."""

import pytest
import torch

from gmkernels import noise
from gmkernels.models import text
from gmkernels.models.text import BEGIN, DIGITS, FASHION, PADDING, Captions, TextEncoder, tokenize

TEXTS = ["a three", "", "3", "a handwritten seven", "drei, größer als zwei"]


def make(**options):
    torch.manual_seed(0)
    return TextEncoder(16, heads=2, **options)


def test_tokens_are_the_bytes():
    tokens = tokenize(TEXTS, 64)
    assert tokens.shape == (5, 1 + len(TEXTS[-1].encode()))
    assert len(TEXTS[-1].encode()) > len(TEXTS[-1])
    for row, string in zip(tokens.tolist(), TEXTS, strict=True):
        given = [token for token in row if token != PADDING]
        assert row == given + [PADDING] * (len(row) - len(given))
        assert given[0] == BEGIN
        assert bytes(given[1:]).decode() == string
    assert tokenize([], 8).shape == (0, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("more", [1, 7, 30])
def test_padding_changes_nothing(more, training):
    encoder, tokens = make().train(training), tokenize(TEXTS, 64)
    padded = torch.nn.functional.pad(tokens, (0, more), value=PADDING)
    context, mask = encoder(tokens)
    longer, longer_mask = encoder(padded)
    assert torch.equal(mask, tokens != PADDING)
    assert torch.equal(longer_mask, padded != PADDING)
    torch.testing.assert_close(longer[longer_mask], context[mask])
    for i, string in enumerate(TEXTS):  # nor do the neighbours
        alone, _ = encoder.encode([string])
        torch.testing.assert_close(alone[0], context[i, mask[i]])


def test_every_text_has_its_own_context():
    encoder = make()
    for one, other in [("ab", "ba"), ("3", "8"), ("", "a"), ("a", "aa")]:
        (x, y), mask = encoder.encode([one, other])
        shared = mask.all(0)
        assert (x - y)[shared].abs().max() > 1e-4 or not torch.equal(mask[0], mask[1])
    one, _ = encoder.encode(["abc"])
    other, _ = encoder.encode(["abd"])
    assert (one[0, 0] - other[0, 0]).abs().max() > 1e-5, "the first token sees the last"


def test_equal_texts_are_encoded_once(monkeypatch):
    encoder, seen = make(), []
    real = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda tokens: seen.append(len(tokens)) or real(tokens))
    texts = [TEXTS[i] for i in (3, 0, 3, 1, 0)]
    context, mask = encoder.encode(texts)
    assert seen == [3]
    expected, expected_mask = real(tokenize(texts, 64))
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(context[mask], expected[mask])


def test_gradient_reaches_everything():
    encoder = make(length=4)
    context, mask = encoder.encode(["abc", "", "de"])
    (context[mask] * torch.arange(16)).square().sum().backward()
    used = torch.tensor([BEGIN, *b"abcde"])
    assert encoder.token.weight.grad[used].abs().amax(1).min() > 0
    assert encoder.token.weight.grad.abs().sum(1).count_nonzero() == len(used), "padding has none"
    for name, p in encoder.named_parameters():
        assert 0 < p.grad.abs().max() < float("inf"), name


@pytest.mark.parametrize("captions", [DIGITS, FASHION])
def test_captions_follow_key_and_row(captions):
    labels, key = torch.arange(1000) % 10, noise.key(3)
    drawn = captions.draw(labels, key)
    assert drawn == captions.draw(labels, key)
    assert drawn != captions.draw(labels, noise.key(4))
    assert drawn[100:] == captions.draw(labels[100:], noise.key(3, offset=100))
    every = {captions.say(i, j) for i in range(10) for j in range(len(captions.templates))}
    assert len(every) == 10 * len(captions.templates), "two labels share a text"
    assert set(drawn) == every
    for label, string in zip(labels.tolist(), drawn, strict=True):
        assert string in {captions.say(label, j) for j in range(len(captions.templates))}
    assert captions.draw(torch.tensor([-1, -1]), key) == ["", ""]
    longest = max(len(string.encode()) for string in every)
    assert longest < TextEncoder().length


def test_captions_speak_of_names_and_numbers():
    captions = Captions(("nought", "unit"), ("a {name}", "number {index}"))
    assert [captions.say(1, j) for j in (0, 1)] == ["a unit", "number 1"]
    assert DIGITS.say(3) == "a handwritten three"


def test_refusals():
    encoder = make(length=8)
    with pytest.raises(ValueError, match=r"at most 7 bytes of UTF-8, got 8 in 'größer'; shorten"):
        encoder.encode(["größe", "größer"])
    with pytest.raises(ValueError, match=r"got 30 in 'aaaaaaaaaaaaaaaaaaaa\.\.\.'; shorten"):
        encoder.encode(["a" * 30])
    with pytest.raises(TypeError, match="must be a list of strings, got the string 'three'"):
        encoder.encode("three")
    with pytest.raises(ValueError, match=r"must be \[B, T\] with T at most 8, got \(1, 9\)"):
        encoder(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="heads must divide the width 16, got 3"):
        text.TextEncoder(16, heads=3)
    for wrong in (-2, 10):
        with pytest.raises(ValueError, match=rf"label must lie in \[-1, 10\), got {wrong}"):
            DIGITS.say(wrong)
