"""Whole training steps and samples of models: with our ops, and of the same in plain PyTorch.

A later model adds a line to MODEL_STEPS.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gmkernels
from benchmarks.sides import COMPILED, EAGER, OURS, OURS_COMPILED, SEED, Side, compiled
from gmkernels import data, registry, train
from gmkernels.models import autoregressive, dropout, gpt2, image_diffusion, image_flow, vae
from gmkernels.models.gpt import GPT, Sizes

REFERENCE = "reference backend"
BESIDE_COMPILED = ", compiled"  # ends the names of sides that are a side compiled
_KEYWORDS_OF_OURS = ("seed", "offset", "generator", "backend")


@dataclass(frozen=True)
class ModelStep:
    """One model's training step, or a sample: how to build the model, and a batch for it.

    The worker process is sent it: functions are those of a module, or partial.

    samples: what sample() is given, where that is timed; it is not compiled, its loop being 50
    networks long. headline: whether `make bench` has it. libraries: sides in plain
    PyTorch but for ops with a peer of that name, which it is, eager and compiled; one that is not
    installed says so in place of its time. unlike: those of them whose ops are other functions of
    the same numbers, so that their losses are not ours. peers: other libraries that draw the same;
    a function of our model gives their call.
    """

    name: str
    case: str
    model: Callable[[], torch.nn.Module]
    batch: Callable[[], Tensor]
    samples: dict[str, Any] | None = None
    headline: bool = False
    libraries: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    peers: dict[str, Callable[[Any], Callable[[], Tensor]]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What is timed."""
        return "training step" if self.samples is None else "sample"


def _digits() -> Tensor:
    return data.digits().train[:100]


def _digits_diffusion() -> torch.nn.Module:
    return image_diffusion.image_diffusion(64, 17, classes=0)


def _nsf() -> torch.nn.Module:
    return image_flow.nsf(2, 0, dropout=0.0)


def _moons() -> Tensor:
    return data.moons().train[:1024]


def _gpt(context: int) -> torch.nn.Module:
    return GPT(Sizes(65, context, layers=4, heads=4, width=128, bias=False))


def _characters(n: int, context: int) -> Tensor:
    return torch.randint(65, (n, context + 1), generator=torch.Generator().manual_seed(SEED))


def _learning(n: int, context: int) -> "ModelStep":
    return ModelStep(
        "GPT",
        f"4 layers of 128, {n} x {context} tokens",
        functools.partial(_gpt, context),
        functools.partial(_characters, n, context),
        libraries=("SDPA",),
    )


def _writer() -> torch.nn.Module:
    model = GPT(Sizes(65, 256, layers=4, heads=4, width=256))
    for p in model.parameters():  # a new GPT says nearly nothing, and its likeliest token is a tie
        p.data.mul_(3 if p.dim() == 2 else 1)
    return model


def _transformers(n: int, model: Any) -> Callable[[], Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    s = model.sizes
    config = GPT2Config(
        vocab_size=s.vocab,
        n_positions=s.context,
        n_embd=s.width,
        n_layer=s.layers,
        n_head=s.heads,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    theirs = GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(gpt2.to_gpt2(model))
    theirs.to(model.token.weight.device)
    prompt = _PROMPT.to(model.token.weight.device).expand(n, -1)
    options = {"max_new_tokens": _TOKENS, "do_sample": False}
    return lambda: theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


_PROMPT, _TOKENS = torch.arange(16), 48


def _made() -> autoregressive.MADE:
    return autoregressive.MADE(64, 17)


def _writing(n: int) -> ModelStep:
    return ModelStep(
        "GPT",
        f"4 layers of 256, {n} x {_TOKENS} tokens after {len(_PROMPT)}",
        _writer,
        functools.partial(_characters, 12, 64),
        {"n": n, "prompt": _PROMPT, "tokens": _TOKENS, "temperature": 0},
        peers={"transformers": functools.partial(_transformers, n)}
        if find_spec("transformers")
        else {},
    )


MODEL_STEPS = (
    ModelStep("VAE", "digits, batch of 100", vae.digits_vae, _digits, headline=True),
    ModelStep("diffusion U-Net", "digits, batch of 100", _digits_diffusion, _digits),
    ModelStep("MADE", "digits, batch of 100", _made, _digits),
    ModelStep(
        "diffusion U-Net",
        "digits, 64 by 50 DDIM steps",
        _digits_diffusion,
        _digits,
        {"n": 64, "steps": 50},
    ),
    _learning(12, 64),
    _learning(4, 256),
    _learning(1, 1024),
    _writing(1),
    _writing(16),
    ModelStep(
        "NSF",
        "two moons, 6 couplings by networks of 64, 8 bins, batch of 1024",
        _nsf,
        _moons,
        libraries=("nflows", "zuko"),
        unlike=("zuko",),
    ),
)


class PlainPyTorch:
    """Puts each row's eager baseline in the place of our op in all models, inside a with block.

    library: ops with a peer of this name have that peer in their place.
    """

    def __init__(self, library: str = "") -> None:
        eager = {
            op.function: _without_our_keywords(op.peers.get(library, op.eager))
            for op in registry.rows()
        }
        kept = _KeptNoise()
        eager |= {gmkernels.add_noise: kept.add_noise, gmkernels.denoising_loss: kept.loss}
        eager |= {dropout.dropout: F.dropout}
        modules = [vars(m) for n, m in sys.modules.items() if n.startswith("gmkernels.models.")]
        # Functions that a module imports, and those of a table of its own.
        places = [*modules, *(v for m in modules for v in m.values() if isinstance(v, dict))]
        self.swaps = [
            (place, name, item, eager[item])
            for place in places
            for name, item in list(place.items())
            if isinstance(item, FunctionType) and item in eager
        ]

    def __enter__(self) -> None:
        for place, name, _, eager in self.swaps:
            place[name] = eager

    def __exit__(self, *exception: object) -> None:
        for place, name, ours, _ in self.swaps:
            place[name] = ours


class _KeptNoise:
    """Noising and loss in plain PyTorch: the noise of the one is kept for the other."""

    def __init__(self) -> None:
        self.eps = torch.empty(0)
        self.noise = _without_our_keywords(registry.row("add_noise").eager)
        self.square = _without_our_keywords(registry.row("denoising_loss").eager)

    def add_noise(self, x0: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x_t, its noise kept."""
        self.eps = torch.randn_like(x0)
        return self.noise(x0, *args, eps=self.eps, **kwargs)

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss under the noise that was kept."""
        return self.square(*args, eps=self.eps, **kwargs)


def _without_our_keywords(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{k: v for k, v in kwargs.items() if k not in _KEYWORDS_OF_OURS})

    return call


def sides_of(step: ModelStep, device: str) -> dict[str, Callable[[], Side]]:
    """How to build each side of a step: every side has its own copy of the model."""

    def reference() -> contextlib.AbstractContextManager[Any]:
        return gmkernels.use_backend("reference")

    plain = PlainPyTorch()
    made = {
        EAGER: lambda: build(step, device, EAGER, lambda: plain),
        COMPILED: lambda: build(step, device, COMPILED, lambda: plain),
        REFERENCE: lambda: build(step, device, REFERENCE, reference),
        OURS: lambda: build(step, device, OURS, contextlib.nullcontext),
        OURS_COMPILED: lambda: build(step, device, OURS_COMPILED, contextlib.nullcontext),
    }
    if step.samples is not None:
        del made[COMPILED], made[OURS_COMPILED]
    for name in step.libraries:
        instead = PlainPyTorch(name)
        for side in (name, name + BESIDE_COMPILED):
            made[side] = functools.partial(build, step, device, side, lambda it=instead: it)
    for name in step.peers:
        made[name] = functools.partial(build, step, device, name, contextlib.nullcontext)
    return made


def build(
    step: ModelStep,
    device: str,
    name: str,
    scope: Callable[[], contextlib.AbstractContextManager[Any]],
) -> Side:
    """One side, which has run once. A call is one update and returns the loss before it."""
    torch.manual_seed(SEED)
    model: Any = step.model().to(device)
    if step.samples is not None:
        options, model = {**step.samples, "seed": SEED}, model.eval()
        side = Side(name, lambda: model.sample(**options), scope)
        if name in step.peers:
            side = Side(name, step.peers[name](model))
        side()
        return side
    x = step.batch().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if name == COMPILED or name.endswith(BESIDE_COMPILED):
        model.loss = compiled(model.loss)
    side = Side(name, lambda: train.training_step(model, optimizer, x, seed=SEED), scope)
    side()
    return side


def fault(step: ModelStep, device: str) -> str:
    """What is wrong with the first losses of our step, against the reference backend's, or "".

    Of a library's step, too. A sample is drawn once; tokens must be equal, and of pictures the
    mean, as a network spreads the rounding of levels.
    """

    def told(x: Tensor) -> list[float]:
        return [float(x.mean())] if x.is_floating_point() else x.flatten().tolist()

    losses, count = {}, 3 if step.samples is None else 1
    like = [name for name in step.libraries if name not in step.unlike]
    for name in (REFERENCE, OURS, *like, *step.peers):
        try:
            side = sides_of(step, device)[name]()
        except ModuleNotFoundError:
            if name not in step.libraries:
                raise
            continue
        losses[name] = [number for _ in range(count) for number in told(side())]
    true = losses.pop(REFERENCE)
    for name, found in losses.items():
        for i, (x, y) in enumerate(zip(found, true, strict=True), 2):
            if not abs(x - y) <= 1e-4 * abs(y):
                return f"the loss of step {i} is {x:.6g} ({name}), the reference's is {y:.6g}"
    return ""
