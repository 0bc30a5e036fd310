"""What the commands need to know of a model, and the options that may be asked of it."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

FLAGS = {
    "label": "--class",
    "text": "--text",
    "sampler": "--sampler",
    "steps": "--steps",
    "guidance": "--guidance",
    "prompt": "--prompt",
    "tokens": "--tokens",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "complete": "--complete",
}  # what sample() may be asked for, by its keyword
LABEL = frozenset({"label"})
GUIDED = LABEL | {"sampler", "steps", "guidance"}
CHOICE = frozenset({"temperature", "top_k", "top_p"})
WRITES = CHOICE | {"prompt", "tokens"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained from the command line.

    Attributes:
        build: (pixels, levels, **options) -> the model; its keyword arguments are --option names.
            The model has loss(x, seed=), sample(n, seed=) and `takes`, "levels" or "unit".
        score: (model, x, key) -> [B], the mean of which over the test part is printed.
        measure: what score is; "nats" is -log p(x) or an upper bound of it.
        kinds: of the data that it models; build is given levels=0 for points. Of text, levels are
            its characters, x is [B, T + 1] ids with T the option context, score the sum over the
            T that follow another, and sample() takes prompt= (ids) and tokens=.
        asks: keywords of sample() beyond n and seed, of FLAGS; "complete" is a verb of the model,
            complete(known pixels [n, K], seed=, ...). With "label", loss() takes label=
            too, unless the option classes is 0; then neither label nor text may be asked for.
        first: a part of the model that is trained alone, by its own loss(x, seed=), in the first
            `share` of the steps.
        turned: (model, train images as the model takes them, key), called between the stages.
        translates: sample() takes pictures in the place of n and seed: rows of the test part.
        update: (model, optimizer, x, seed=, **conditions) -> loss, one update, in the place of
            train.training_step: alternating players, averages of weights.
        picture: (model, test images as the model takes them, key) -> [n, pixels] in [0, 1], what
            the run draws in the place of samples, of a model that has none.
        betas: of AdamW.
        cosine: whether the learning rate goes down to 0; else it stays after the warm-up.
        defaults: settings of the run (steps, lr, ...) that suit this model better.
    """

    build: Callable[..., nn.Module]
    score: Callable[[Any, Tensor, Tensor], Tensor]
    measure: str = "nats"
    kinds: tuple[str, ...] = ("images",)
    asks: frozenset[str] = frozenset()
    first: str | None = None
    share: float = 0.0
    turned: Callable[[Any, Tensor, Tensor], object] | None = None
    translates: bool = False
    update: Callable[..., Tensor] | None = None
    picture: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    cosine: bool = True
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
    name: str, recipe: Recipe, options: dict[str, Any], run: Path, asked: dict[str, Any]
) -> dict[str, Any]:
    """What was asked for, as the model's sample() takes it. Raises ValueError with what is wrong.

    Args:
        name: of the recipe. options: that the model was built with. run: its folder, for messages.
        asked: the keywords of FLAGS; None for what was not asked.
    """
    found = {key: value for key, value in asked.items() if value is not None}
    strange = [FLAGS[key] for key in found if key not in recipe.asks]
    if strange:
        able = (
            ", ".join(flag for key, flag in FLAGS.items() if key in recipe.asks) or "none of them"
        )
        raise ValueError(
            f"{', '.join(strange)} cannot be asked of a {name}, which {run} holds; it takes {able}"
        )
    classes, named = options.get("classes", 0), "label" in found
    if named and not classes:
        raise ValueError(
            f"--class needs a model of classes, as -o classes=10 trains; {run} holds a {name} "
            "without"
        )
    if named and not 0 <= found["label"] < classes:
        raise ValueError(f"--class must lie in [0, {classes}), got {found['label']}")
    if "text" in found and not classes:
        raise ValueError(f"--text is for models that read text; {run} holds a {name} without")
    if "text" in found and named:
        raise ValueError("--text and --class both say what to draw; leave one of them out")
    if found.get("guidance", 1.0) != 1.0 and not named and "text" not in found:
        raise ValueError("--guidance needs --class or --text: it weighs them against nothing asked")
    return found
