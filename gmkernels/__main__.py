"""`python -m gmkernels train MODEL ...`, `sample RUN ...` and `compare WHAT ...`."""

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gmkernels import arguments, checkpoint, data, runs, train
from gmkernels.recipes import FLAGS, RECIPES, parse_options, sample_options
from gmkernels.runs import DEFAULTS


def _threads(images: data.Data, batch_size: int) -> int:
    """One for batches as small as the digits', where waking a second costs more than it does."""
    small = batch_size * images.height * images.width * images.levels < 1 << 20
    return 1 if small and images.kind != "text" else torch.get_num_threads()


def _new_config(args: argparse.Namespace) -> tuple[runs.Config, data.Data]:
    chosen = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    settings = DEFAULTS | RECIPES[args.model].defaults | chosen
    options = parse_options(RECIPES[args.model].build, args.option)
    images = data.load(settings["data"])
    if images.kind not in (kinds := RECIPES[args.model].kinds):
        able = ", ".join(name for name, recipe in RECIPES.items() if images.kind in recipe.kinds)
        raise ValueError(
            f"--data {images.name} holds {images.kind}, a {args.model} takes {' or '.join(kinds)}; "
            f"{images.kind} can train {able or 'nothing'}"
        )
    most = 0 if images.train_labels is None else int(images.train_labels.max()) + 1
    if 0 < options.get("classes", 0) < most:
        raise ValueError(
            f"--option classes must be 0 or at least {most}, the classes of {images.name}, "
            f"got {options['classes']}"
        )
    threads = args.threads or _threads(images, settings["batch_size"])
    config = runs.new_config(args.model, images, options, threads, settings)
    return config, _cut(images, config)


def _cut(images: data.Data, config: runs.Config) -> data.Data:
    """A text in pieces of the model's context."""
    return images.cut(config.options["context"]) if isinstance(images, data.Text) else images


def _old_config(args: argparse.Namespace) -> tuple[runs.Config, data.Data]:
    if not (args.out / runs.CONFIG).is_file():
        raise ValueError(
            f"--resume: there is no run in {args.out}; leave --resume out to start one"
        )
    config = runs.read_config(args.out)
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
    if images.vocab != config.vocabulary:
        raise ValueError(f"--resume: {config.data} has changed to the characters {images.vocab!r}")
    return config, _cut(images, config)


def prepare_train(args: argparse.Namespace) -> Callable[[], None]:
    """Checks everything that can be wrong, then makes the folder; returns what is left to do."""
    if not args.resume and args.out.exists() and (args.out.is_file() or any(args.out.iterdir())):
        raise ValueError(
            f"--out {args.out} must be new or empty; choose another, or --resume its run"
        )
    config, images = _old_config(args) if args.resume else _new_config(args)
    if config.samples.endswith(".png") and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{config.samples} needs matplotlib; pip install matplotlib")
    if config.batch_size > len(images.train):
        raise ValueError(
            f"--batch-size must be at most the {len(images.train)} train {images.one}s, "
            f"got {config.batch_size}"
        )
    if config.steps <= (turn := config.recipe.turn(config.steps)):
        raise ValueError(f"--steps must be > {turn} for a {config.model}, got {config.steps}")
    if config.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}: torch sees no GPU here; leave it out")
    torch.set_num_threads(config.threads)
    model = runs.build(config)
    if config.batch_size < (least := getattr(model, "least_batch", 1)):
        raise ValueError(
            f"--batch-size must be at least {least} for this {config.model}, "
            f"got {config.batch_size}"
        )
    if (args.out / runs.CHECKPOINT).is_file():
        checkpoint.restore(args.out / runs.CHECKPOINT, model)
    if not args.resume:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        checkpoint.write_atomically(args.out / runs.CONFIG, text.encode())

    def work() -> None:
        start = time.perf_counter()
        score = train.fit(args.out, config, model, images)
        seconds, measure = time.perf_counter() - start, config.recipe.measure
        what = f"{measure} (-log p(x) or its bound)" if measure == "nats" else measure
        print(
            f"{args.out}: {config.steps} steps, {seconds:.1f} s; mean of the {images.test_size} "
            f"test {images.one}s: {score:.{2 if images.kind == 'images' else 4}f} {what} per "
            f"{images.one}"
        )

    return work


def prepare_sample(args: argparse.Namespace) -> Callable[[], None]:
    """Loads the run and checks the target; returns what is left to do."""
    suffix = Path(runs.read_config(args.run).samples).suffix
    if args.out is None and suffix == ".png":
        raise ValueError("--out must be a .png file, there is none")
    if args.out is not None and args.out.suffix != suffix:
        raise ValueError(f"--out must be a {suffix} file, got {args.out}")
    if args.out is not None and not args.out.parent.is_dir():
        raise ValueError(f"--out: the folder {args.out.parent} must exist; make it first")
    config, model = runs.load(args.run)
    if config.recipe.picture is not None:
        raise ValueError(
            f"{args.run} holds a {config.model}, which is no model of p(x) and draws nothing; "
            f"{runs.SAMPLES} there shows what it does to test images"
        )
    asked = {name: getattr(args, name) for name in FLAGS}
    options = sample_options(config.model, config.recipe, config.options, args.run, asked)
    n = args.n or (1 if config.vocabulary else 64)
    x = runs.sample(config, model, n, args.seed, **options)
    if args.out is None:
        return lambda: print(runs.written(config, x), end="")
    return lambda: runs.save_samples(args.out, config, model, x, **options)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0; 2 for bad input, on one line; 1 for a failure of the run; 130 for Ctrl-C."""
    parser = arguments.parser(prepare_train, prepare_sample)
    args = parser.parse_args(argv)
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
        again = "; --resume goes on from the last checkpoint"
        print(f"gmkernels: interrupted{again if 'resume' in args else ''}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
