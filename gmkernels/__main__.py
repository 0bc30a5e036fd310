"""`python -m gmkernels train MODEL ...`, `sample RUN ...` and `compare WHAT ...`."""

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from gmkernels import checkpoint, compare, data, noise, train
from gmkernels.models import sampling
from gmkernels.recipes import RECIPES, option_defaults, parse_options, sample_options

DEFAULTS: dict[str, Any] = {
    "data": "digits",
    "steps": 2000,
    "batch_size": 100,
    "lr": 5e-3,
    "weight_decay": 1e-2,
    "seed": 0,
    "every": 200,
    "device": "cpu",
}
SAMPLING = ("sampler", "steps", "label", "text", "guidance")  # what sample may be asked for


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


def _threads(images: data.Images | data.Points, batch_size: int) -> int:
    """One for batches as small as the digits', where waking a second costs more than it does."""
    small = batch_size * images.height * images.width * images.levels < 1 << 20
    return 1 if small else torch.get_num_threads()


def _new_config(args: argparse.Namespace) -> tuple[train.Config, data.Images | data.Points]:
    chosen = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    settings = DEFAULTS | RECIPES[args.model].defaults | chosen
    options = parse_options(RECIPES[args.model].build, args.option)
    images = data.load(settings["data"])
    if images.levels == 0 and not RECIPES[args.model].points:
        able = ", ".join(name for name, recipe in RECIPES.items() if recipe.points)
        raise ValueError(
            f"--data {images.name} holds points, a {args.model} takes pictures; {able} take both"
        )
    most = 0 if images.train_labels is None else int(images.train_labels.max()) + 1
    if 0 < options.get("classes", 0) < most:
        raise ValueError(
            f"--option classes must be 0 or at least {most}, the classes of {images.name}, "
            f"got {options['classes']}"
        )
    config = train.Config(
        model=args.model,
        options=options,
        height=images.height,
        width=images.width,
        levels=images.levels,
        threads=args.threads or _threads(images, settings["batch_size"]),
        **settings,
    )
    return config, images


def _old_config(args: argparse.Namespace) -> tuple[train.Config, data.Images | data.Points]:
    if not (args.out / train.CONFIG).is_file():
        raise ValueError(
            f"--resume: there is no run in {args.out}; leave --resume out to start one"
        )
    config = train.read_config(args.out)
    given = {name: getattr(args, name) for name in ("model", "threads", *DEFAULTS)}
    if args.option:
        changed = parse_options(RECIPES[args.model].build, args.option)
        names = [pair.partition("=")[0] for pair in args.option]
        given["options"] = config.options | {name: changed[name] for name in names}
    for name, value in given.items():
        stored = getattr(config, name)
        if value is not None and value != stored:
            raise ValueError(
                f"--resume: {name} is {stored} in {args.out}, {value} on the command line; "
                "leave it out, or start another run"
            )
    images = data.load(config.data)
    found = (images.height, images.width, images.levels)
    if found != (config.height, config.width, config.levels):
        raise ValueError(f"--resume: the images of {config.data} have changed to {found}")
    return config, images


def prepare_train(args: argparse.Namespace) -> Callable[[], None]:
    """Checks everything that can be wrong, then makes the folder; returns what is left to do."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("samples.png needs matplotlib; pip install matplotlib")
    if not args.resume and args.out.exists() and (args.out.is_file() or any(args.out.iterdir())):
        raise ValueError(
            f"--out {args.out} must be new or empty; choose another, or --resume its run"
        )
    config, images = _old_config(args) if args.resume else _new_config(args)
    if config.batch_size > len(images.train):
        raise ValueError(
            f"--batch-size must be at most the {len(images.train)} train images, "
            f"got {config.batch_size}"
        )
    if config.steps <= (turn := RECIPES[config.model].turn(config.steps)):
        raise ValueError(f"--steps must be > {turn} for a {config.model}, got {config.steps}")
    if config.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}: torch sees no GPU here; leave it out")
    torch.set_num_threads(config.threads)
    model = train.build(config)
    if (args.out / train.CHECKPOINT).is_file():
        checkpoint.restore(args.out / train.CHECKPOINT, model)
    if not args.resume:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        checkpoint.write_atomically(args.out / train.CONFIG, text.encode())

    def work() -> None:
        start = time.perf_counter()
        nats = train.fit(args.out, config, model, images)
        seconds = time.perf_counter() - start
        value, one = (
            (f"{nats:.2f} nats an", "image") if images.levels else (f"{nats:.4f} nats a", "point")
        )
        print(
            f"{args.out}: {config.steps} steps, {value} {one} on the "
            f"{len(images.test)} test {one}s (-log p(x) or its bound), {seconds:.1f} s"
        )

    return work


def prepare_sample(args: argparse.Namespace) -> Callable[[], None]:
    """Loads the run and checks the target; returns what is left to do."""
    if args.out.suffix != ".png":
        raise ValueError(f"--out must be a .png file, got {args.out}")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out: the folder {args.out.parent} must exist; make it first")
    config, model = train.load(args.run)
    asked = {name: getattr(args, name) for name in SAMPLING}
    options = sample_options(config.model, config.options, args.run, asked)
    x = train.sample(config, model, args.n, args.seed, **options)
    return lambda: train.save_samples(args.out, config, model, x, **options)


def _parser() -> Parser:
    parser = Parser(prog="gmkernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="train|sample|compare")
    compare.add_parser(commands)

    fit = commands.add_parser("train", help="train a model")
    fit.set_defaults(prepare=prepare_train)
    fit.add_argument("model", choices=sorted(RECIPES))
    fit.add_argument("--out", type=Path, required=True, help="folder of the run")
    fit.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    fit.add_argument(
        "--data", help="digits (the default), moons, idx:FOLDER, or a folder of IDX files"
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
        ("batch-size", _count, "images an update"),
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

    draw = commands.add_parser("sample", help="draw pictures from a trained model")
    draw.set_defaults(prepare=prepare_sample)
    draw.add_argument("run", type=Path, help="folder of the run")
    draw.add_argument("--n", type=_count, default=64, help="how many")
    draw.add_argument("--seed", type=_seed, default=0)
    draw.add_argument("--sampler", choices=sorted(sampling.STEPS), help="of a diffusion model")
    draw.add_argument("--steps", type=_count, help="of the sampler (default 50)")
    draw.add_argument("--class", dest="label", type=int, metavar="CLASS", help="what to draw")
    draw.add_argument("--text", help="what to draw, in words, by a model that reads them")
    draw.add_argument("--guidance", type=_number, help="weight of class or text (default 1)")
    draw.add_argument("--out", type=Path, required=True, help="a .png file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0; 2 for bad input, on one line; 1 for a failure of the run; 130 for Ctrl-C."""
    args = (parser := _parser()).parse_args(argv)
    try:
        work = args.prepare(args)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    try:
        work()
    except (FloatingPointError, OSError) as error:
        print(f"gmkernels: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gmkernels: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
