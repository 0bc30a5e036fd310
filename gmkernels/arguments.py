"""The command line: its flags, their types and their help."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gmkernels import compare, noise
from gmkernels.models import sampling
from gmkernels.recipes import FLAGS, RECIPES, option_defaults
from gmkernels.runs import DEFAULTS

Prepare = Callable[[argparse.Namespace], Callable[[], None]]


class Parser(argparse.ArgumentParser):
    """Errors on one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(2, f"{self.prog}: {message}\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number >= 0, got {text!r}")
    return value


def _seed(text: str) -> int:
    try:
        noise.key(value := int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be an integer in [-2^63, 2^63), got {text!r}"
        ) from None
    return value


def _add_sample(commands: Any, prepare: Prepare) -> None:
    draw = commands.add_parser("sample", help="draw pictures or text from a trained model")
    draw.set_defaults(prepare=prepare)
    draw.add_argument("run", type=Path, help="folder of the run")
    draw.add_argument("--n", type=_count, help="how many (default 64, of texts 1)")
    draw.add_argument("--seed", type=_seed, default=0)
    draw.add_argument("--sampler", choices=sorted(sampling.STEPS), help="of a diffusion model")
    draw.add_argument("--steps", type=_count, help="of the sampler (default 50)")
    draw.add_argument(FLAGS["label"], dest="label", type=int, metavar="CLASS", help="what to draw")
    draw.add_argument("--text", help="what to draw, in words, by a model that reads them")
    draw.add_argument("--guidance", type=_number, help="weight of class or text (default 1)")
    draw.add_argument("--prompt", help="how a text begins (default a new line)")
    draw.add_argument("--tokens", type=_count, help="to write after the prompt (default 500)")
    draw.add_argument("--temperature", type=_number, help="of a text, 0 is the likeliest")
    draw.add_argument("--top-k", type=_count, help="only the likeliest tokens, this many")
    draw.add_argument("--top-p", type=_number, help="only the likeliest, of this mass in all")
    draw.add_argument(
        "--complete",
        action="store_true",
        default=None,
        help="draw the lower halves of test pictures, by a model that can",
    )
    draw.add_argument("--out", type=Path, help="a .png file; of texts a .txt, or none to print")


def parser(train: Prepare, sample: Prepare) -> Parser:
    """Of the commands; train and sample check their arguments and return the work to do."""
    parser = Parser(prog="python -m gmkernels", description="Train models and draw from them.")
    commands = parser.add_subparsers(required=True, metavar="train|sample|compare")
    compare.add_parser(commands)

    fit = commands.add_parser("train", help="train a model")
    fit.set_defaults(prepare=train)
    fit.add_argument("model", choices=sorted(RECIPES))
    fit.add_argument("--out", type=Path, required=True, help="folder of the run")
    fit.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    fit.add_argument(
        "--data",
        help="digits (the default), moons, ring, text:FILE, idx:FOLDER, or a folder of IDX files",
    )
    arguments = "; ".join(
        f"{name}: " + ", ".join(f"{k}={v}" for k, v in option_defaults(recipe.build).items())
        for name, recipe in RECIPES.items()
    )
    fit.add_argument(
        "--option",
        "-o",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"an argument of the model, may be repeated; defaults of {arguments}",
    )
    for name, kind, text in (
        ("steps", _count, "updates in all"),
        ("batch-size", _count, "images, points or pieces of text an update"),
        ("lr", _number, "highest learning rate, after a warm-up and before a cosine"),
        ("weight-decay", _number, "of AdamW"),
        ("seed", _seed, "of everything random"),
        ("every", _count, "updates between tests and checkpoints"),
        ("threads", _count, "of torch on the CPU; 1 for small images, else all cores"),
    ):
        default = DEFAULTS.get(name.replace("-", "_"))
        text += "" if default is None else f" (default {default})"
        fit.add_argument(f"--{name}", type=kind, help=text)
    fit.add_argument("--device", choices=("cpu", "cuda"))

    _add_sample(commands, sample)
    return parser
