"""Hybrids: a transformer as the prior of a VQ-VAE's codes, and any p(x|y) as a classifier.

Tokens and a prior (van den Oord et al. 2017, 3.3; Ramesh et al. 2021, 2102.12092, section 2): the
n codes c of a trained VQ-VAE in reading order, after a condition y, are one sequence of a GPT.
    p(c|y) = prod_t p(c_t | y, c_<t)                                                     exact
    log p(x|y) = log sum_c p(c|y) p(x|c) >= log p(c(x)|y) + log p(x|c(x)),   c(x) the codes of x
    sample     c ~ p(c|y), x ~ p(x|c)
y is a mark, "a picture" or its class, or a text: its bytes as marks, padded so that codes keep
their places. Before training all codes are about as likely: the VQ-VAE's own bound.

Generative classifier: P(y|x) = p(x|y) P(y) / sum_k p(x|k) P(k)              Ng and Jordan 2001
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.models import text as texts
from gmkernels.models.gpt import GPT
from gmkernels.models.vqvae import VQVAE

Text = str | Sequence[str] | None


class TokenPrior(nn.Module):
    """A GPT over a trained VQ-VAE's codes, conditional on a class, on a text, or on nothing.

    Args:
        vqvae: trained before; always in eval mode here and never given a gradient.
        gpt: of the VQ-VAE's K codes, with `marks_needed` marks and a context of n + `length` - 1
            tokens or more.
        classes: of labels in [0, classes). 0: none.
        captions: what the classes are called; then a label is a caption, and text= may be given.
        length: tokens of the condition: 1 without captions, with them those of the longest text
            (its bytes and one).
    Raises:
        ValueError: sizes other than said here.

    Everywhere: x as the VQ-VAE takes it; codes int64 [B, *grid]; label int64 [B] or one for all;
    text one string or one a row. Of a model of classes without either, what is said is of the mean
    over the classes. seed an int, a key or None.
    """

    log_prob_kind = "lower bound"

    def __init__(
        self,
        vqvae: VQVAE,
        gpt: GPT,
        *,
        classes: int = 0,
        captions: texts.Captions | None = None,
        length: int = 1,
    ) -> None:
        super().__init__()
        size, codes = math.prod(vqvae.grid), len(vqvae.codebook.codes)
        marks = self.marks_needed(classes, captions)
        for rule, holds in {
            f"the GPT's vocab must be the {codes} codes": gpt.sizes.vocab == codes,
            f"its marks must be {marks}": gpt.sizes.marks == marks,
            f"its context at least {size + length - 1}": gpt.sizes.context >= size + length - 1,
            "length must be 1 without captions": length == 1 or captions is not None,
            "captions must name the classes": captions is None
            or 0 < classes <= len(captions.names),
        }.items():
            if not holds:
                raise ValueError(
                    f"TokenPrior: {rule}; got {gpt.sizes}, length {length}, classes {classes}"
                )
        self.vqvae, self.gpt = vqvae.eval(), gpt
        self.classes, self.captions, self.length = classes, captions, length

    @staticmethod
    def marks_needed(classes: int, captions: texts.Captions | None) -> int:
        """Marks that say the condition: bytes, BEGIN and PADDING; or one a class; or one."""
        return max(1, classes) if captions is None else texts.PADDING + 1

    @property
    def takes(self) -> str:
        """The x of the verbs: "levels" (integers) or "unit" (floats)."""
        return self.vqvae.takes

    def train(self, mode: bool = True) -> "TokenPrior":
        """As of any module, but the VQ-VAE stays in eval mode."""
        super().train(mode)
        self.vqvae.eval()
        return self

    def loss(
        self, x: Tensor, label: Tensor | None = None, *, text: Text = None, seed: noise.Seed = None
    ) -> Tensor:
        """What training minimises, a scalar: the mean of -log p(codes of x | condition), nats.

        A label becomes one of its captions, drawn anew. No gradient to the VQ-VAE.
        """
        with torch.no_grad():
            codes = self.vqvae.encode(x)
        if self.captions is not None and label is not None and text is None:
            key = noise.resolve_key("loss", seed, 0, None, x.device)
            text, label = self.captions.draw(label, key), None
        return -self.log_prob_codes(codes, label, text=text).mean()

    def log_prob_codes(
        self, codes: Tensor, label: Tensor | int | None = None, *, text: Text = None
    ) -> Tensor:
        """log p(codes|condition), [B] nats, exact."""
        if codes.shape[1:] != self.vqvae.grid:
            raise ValueError(
                f"log_prob_codes: codes must be [B, *grid] with grid {self.vqvae.grid}, got "
                f"{tuple(codes.shape)}"
            )
        if label is None and text is None and self.classes:
            every = [self.log_prob_codes(codes, k) for k in range(self.classes)]
            return torch.stack(every).logsumexp(0) - math.log(self.classes)
        tokens = [self._condition(len(codes), label, text), codes.flatten(1)]
        return self.gpt.log_prob(torch.cat(tokens, 1), given=self.length)

    def log_prob(
        self, x: Tensor, label: Tensor | int | None = None, *, text: Text = None
    ) -> Tensor:
        """A lower bound of log p(x|condition), [B] nats: that of the module's header."""
        codes = self.vqvae.encode(x)
        nll = self.vqvae.likelihood.nll(x, self.vqvae.decode(codes))
        return self.log_prob_codes(codes, label, text=text) - nll

    @torch.no_grad()
    def sample_codes(
        self,
        n: int,
        label: Tensor | int | None = None,
        *,
        text: Text = None,
        seed: noise.Seed = None,
        **options: Any,
    ) -> Tensor:
        """n draws of codes [n, *grid], each in [0, K): marks are read and never drawn.

        options: temperature, top_k and top_p of next_token().
        """
        device = self.gpt.token.weight.device
        key = noise.resolve_key("sample", seed, 0, None, device)
        if label is None and text is None and self.classes:
            u = noise.uniform((n, 1), seed=noise.fold_in(key, 0), device=device)[:, 0]
            label = (u * self.classes).ceil().long() - 1  # u is in (0, 1]
        condition, size = self._condition(n, label, text), math.prod(self.vqvae.grid)
        codes = self.gpt.generate(condition, size, seed=noise.fold_in(key, 1), **options)
        return codes.unflatten(1, self.vqvae.grid)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        label: Tensor | int | None = None,
        *,
        text: Text = None,
        seed: noise.Seed = None,
        **options: Any,
    ) -> Tensor:
        """n draws x ~ p(x|c), c ~ p(c|condition). Others as in sample_codes()."""
        key = noise.resolve_key("sample", seed, 0, None, self.gpt.token.weight.device)
        codes = self.sample_codes(n, label, text=text, seed=key, **options)
        return self.vqvae.likelihood.sample(self.vqvae.decode(codes), noise.fold_in(key, 2))

    def _condition(self, n: int, label: Tensor | int | None, text: Text) -> Tensor:
        """The marks before the codes, [n, length]."""
        if text is not None and (label is not None or self.captions is None):
            raise ValueError(
                "TokenPrior: text= needs a model with captions, and no label beside it; this one "
                f"has {'captions' if self.captions else 'none'}, label {label}"
            )
        if label is not None and not self.classes:
            raise ValueError("TokenPrior: label= needs a model of classes; this one has none")
        first, device = self.gpt.sizes.vocab, self.gpt.token.weight.device
        labels = torch.as_tensor(0 if label is None else label, device=device).expand(n)
        if label is not None and not bool(((labels >= 0) & (labels < self.classes)).all()):
            raise ValueError(
                f"TokenPrior: label must lie in [0, {self.classes}), got {int(labels.min())} to "
                f"{int(labels.max())}"
            )
        if self.captions is None:
            return first + labels[:, None]
        if text is None:
            text = [self.captions.say(k) for k in labels.tolist()]
        said = [text] * n if isinstance(text, str) else list(text)
        if len(said) != n:
            raise ValueError(f"TokenPrior: text must be one string or {n}, got {len(said)}")
        tokens = texts.tokenize(said, self.length).to(device)
        padding = (0, self.length - tokens.shape[1])
        return first + nn.functional.pad(tokens, padding, value=texts.PADDING)


class GenerativeClassifier:
    """P(y|x) from any model of p(x|y): argmax_y log p(x|y) + log P(y).

    Args:
        log_prob: (x [B, *], labels int64 [B]) -> log p(x|y) or a bound of it, [B] nats.
        log_prior: log P(y) of each of K >= 2 classes, [K]; ValueError for another shape.

    >>> import torch
    >>> half = torch.tensor([0.5, 0.5]).log()
    >>> model = GenerativeClassifier(lambda x, y: -(x - 3 * y).square() / 2, half)
    >>> model.predict(torch.tensor([1.0, 2.0]))
    tensor([0, 1])
    """

    def __init__(self, log_prob: Callable[[Tensor, Tensor], Tensor], log_prior: Tensor) -> None:
        if log_prior.dim() != 1 or len(log_prior) < 2:
            raise ValueError(
                "GenerativeClassifier: log_prior must be [K] with K >= 2, got "
                f"{tuple(log_prior.shape)}"
            )
        self.log_likelihood, self.log_prior = log_prob, log_prior

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y) for each y, [B, K]."""
        labels = torch.arange(len(self.log_prior), device=x.device)
        each = [self.log_likelihood(x, k.expand(len(x))) for k in labels]
        return torch.stack(each, 1) + self.log_prior

    def predict_log_proba(self, x: Tensor) -> Tensor:
        """log P(y|x), the posterior, [B, K]."""
        return self.log_joint(x).log_softmax(1)

    def predict_proba(self, x: Tensor) -> Tensor:
        """P(y|x), [B, K]."""
        return self.predict_log_proba(x).exp()

    def predict(self, x: Tensor) -> Tensor:
        """argmax_y P(y|x), int64 [B]."""
        return self.log_joint(x).argmax(1)

    def score(self, x: Tensor, y: Tensor) -> float:
        """The share of rows whose label y [B] is predicted."""
        return float((self.predict(x) == y).double().mean())
