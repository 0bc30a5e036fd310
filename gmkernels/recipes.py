"""What the commands can train: a recipe a model, and the options that may be asked of it."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gmkernels.models import image_diffusion, image_flow, image_latent_diffusion, vae


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained from the command line.

    Attributes:
        build: (pixels, levels, **options) -> the model; its keyword arguments are --option names.
            The model has loss(x, seed=), sample(n, seed=) and `takes`, "levels" or "unit".
        nll: (model, x, key) -> [B] nats, -log p(x) or an upper bound of it.
        labelled: loss() takes label= too, and sample() label=, unless the option classes is 0.
        guided: sample() takes sampler=, steps= and guidance= too.
        points: it models points of the plane as well as pictures; build is then given levels=0.
        reads: sample() takes text= too, unless the option classes is 0.
        first: a part of the model that is trained alone, by its own loss(x, seed=), in the first
            `share` of the steps; then model.measure_scale(train images, seed=) ends that stage.
        defaults: settings of the run (steps, lr, ...) that suit this model better.
    """

    build: Callable[..., nn.Module]
    nll: Callable[[Any, Tensor, Tensor], Tensor]
    labelled: bool = False
    guided: bool = False
    points: bool = False
    reads: bool = False
    first: str | None = None
    share: float = 0.0
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)

    def turn(self, steps: int) -> int:
        """How many of `steps` steps train the first part alone."""
        return 0 if self.first is None else max(1, round(self.share * steps))

    def stage(self, model: Any, steps: int, step: int) -> tuple[Any, int, int]:
        """What step `step` trains, the model or its first part, from which step on, up to which."""
        turn = self.turn(steps)
        if self.first is not None and step < turn:
            return getattr(model, self.first), 0, turn
        return model, turn, steps


def _bound(model: Any, x: Tensor, key: Tensor) -> Tensor:
    return model.vlb(x, seed=key).nats


def _latent_bound(model: Any, x: Tensor, key: Tensor) -> Tensor:
    """The VAE's own bound until there is a diffusion model of its latents."""
    return -(model.log_prob if model.measured else model.vae.elbo)(x, seed=key)


def _flow_nats(model: Any, x: Tensor, key: Tensor) -> Tensor:
    return -model.log_prob(x, seed=key)


def _flow(build: Callable[..., nn.Module], **defaults: Any) -> Recipe:
    return Recipe(build, _flow_nats, labelled=True, points=True, defaults=_FLOW | defaults)


_FLOW = {"lr": 2e-3, "steps": 800}
_DIFFUSION = {"lr": 2e-3, "every": 1000, "weight_decay": 1e-3}
RECIPES = {
    "vae": Recipe(vae.image_vae, lambda model, x, key: -model.elbo(x, seed=key)),
    "realnvp": _flow(image_flow.realnvp),
    "glow": _flow(image_flow.glow),
    "nsf": _flow(image_flow.nsf),
    "maf": _flow(image_flow.maf, steps=600, weight_decay=0.3),
    "diffusion": Recipe(
        image_diffusion.image_diffusion, _bound, labelled=True, guided=True, defaults=_DIFFUSION
    ),
    "flow_matching": Recipe(
        image_diffusion.image_flow_matching, _bound, labelled=True, guided=True, defaults=_DIFFUSION
    ),
    "latent_diffusion": Recipe(
        image_latent_diffusion.image_latent_diffusion,
        _latent_bound,
        labelled=True,
        guided=True,
        reads=True,
        first="vae",
        share=0.25,
        defaults=_DIFFUSION | {"steps": 2400, "every": 600},
    ),
}


def option_defaults(build: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only arguments of a builder with their defaults."""
    parameters = inspect.signature(build).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def parse_options(build: Callable[..., Any], given: list[str]) -> dict[str, Any]:
    """Keyword arguments of `build` from NAME=VALUE pairs, typed like its defaults, and the rest."""
    options = option_defaults(build)
    for pair in given:
        name, equals, text = pair.partition("=")
        if name not in options or not equals:
            raise ValueError(
                f"--option must be NAME=VALUE with NAME of {', '.join(options)}, got {pair!r}"
            )
        kind = type(options[name])
        try:
            known = {"true": True, "false": False}
            options[name] = known[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            kinds = {bool: "true or false", int: "a whole number", float: "a number"}
            raise ValueError(f"--option {name} must be {kinds[kind]}, got {text!r}") from None
    return options


def sample_options(
    name: str, options: dict[str, Any], run: Path, asked: dict[str, Any]
) -> dict[str, Any]:
    """What was asked for, as the model's sample() takes it. Raises ValueError with what is wrong.

    Args:
        name: of the recipe. options: that the model was built with. run: its folder, for messages.
        asked: sampler, steps, label, text and guidance; None for what was not.
    """
    found = {key: value for key, value in asked.items() if value is not None}
    recipe, classes, named = RECIPES[name], options.get("classes", 0), "label" in found
    if found and not recipe.labelled:
        raise ValueError(
            f"--sampler, --steps, --class, --text and --guidance are for diffusion models; {run} "
            f"holds a {name}"
        )
    if found.keys() - {"label"} and not recipe.guided:
        raise ValueError(
            f"--sampler, --steps, --text and --guidance are for diffusion models; {run} holds a "
            f"{name}"
        )
    if named and not classes:
        raise ValueError(
            f"--class needs a model of classes, as -o classes=10 trains; {run} holds a {name} "
            "without"
        )
    if named and not 0 <= found["label"] < classes:
        raise ValueError(f"--class must lie in [0, {classes}), got {found['label']}")
    if "text" in found and not (recipe.reads and classes):
        raise ValueError(f"--text is for models that read text; {run} holds a {name} without")
    if "text" in found and named:
        raise ValueError("--text and --class both say what to draw; leave one of them out")
    if found.get("guidance", 1.0) != 1.0 and not named and "text" not in found:
        raise ValueError("--guidance needs --class or --text: it weighs them against nothing asked")
    return found
