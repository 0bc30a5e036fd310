"""A run: its folder, its configuration, its model, and what the model draws.

All randomness is a function of (config.seed, step): keys folded from the seed give the batches, the
model's own noise, and the seed of torch's generator (dropout), set anew at each step. A run folder
holds config.json, metrics.csv, checkpoint.safetensors and samples.png (of text samples.txt), each
written atomically.
"""

import dataclasses
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmkernels import checkpoint, data, noise, pictures, text_data
from gmkernels.recipes import RECIPES, Recipe, option_defaults

CONFIG, METRICS, CHECKPOINT, SAMPLES, TEXTS = (
    "config.json",
    "metrics.csv",
    "checkpoint.safetensors",
    "samples.png",
    "samples.txt",
)
DEFAULTS: dict[str, Any] = {
    "data": "digits",
    "steps": 2000,
    "batch_size": 100,
    "lr": 5e-3,
    "weight_decay": 1e-2,
    "seed": 0,
    "every": 200,
    "device": "cpu",
}  # settings of a run, below its recipe's own
BATCHES, STEPS, TEST, INIT, DRAWN = range(5)  # what the seed is folded with


@dataclasses.dataclass(frozen=True)
class Config:
    """All that determines a run's bits on one machine; stored as config.json."""

    model: str
    data: str
    options: dict[str, Any]
    height: int
    width: int
    levels: int
    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    every: int
    threads: int
    device: str
    vocabulary: str = ""  # the characters of a text

    @property
    def recipe(self) -> Recipe:
        """Of the model."""
        return RECIPES[self.model]

    @property
    def samples(self) -> str:
        """The file of samples that a run ends with."""
        return TEXTS if self.vocabulary else SAMPLES

    @property
    def draws(self) -> int:
        """How many samples that file holds: pictures, points or texts."""
        if self.vocabulary:
            return 4
        return 64 if self.levels else 1000


def new_config(
    model: str, images: data.Data, options: dict[str, Any], threads: int, settings: dict[str, Any]
) -> Config:
    """The configuration of a new run on these data; settings: a value for each of DEFAULTS."""
    return Config(
        model=model,
        options=options,
        height=images.height,
        width=images.width,
        levels=images.levels,
        vocabulary=images.vocab,
        threads=threads,
        **settings,
    )


def read_config(run: Path) -> Config:
    """The configuration of a run folder. Raises ValueError with what is wrong."""
    path = run / CONFIG
    if not path.is_file():
        raise ValueError(f"{run} must be the folder of a run, with {CONFIG}; there is none")
    try:
        config = Config(**json.loads(path.read_text()))
        known = option_defaults(config.recipe.build)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or of another version ({error})") from error
    if config.options.keys() != known.keys():
        raise ValueError(
            f"{path} is of another version: options must be {', '.join(known)}, "
            f"got {', '.join(config.options)}"
        )
    return config


def build(config: Config) -> Any:
    """The model at its initial weights, on the run's device."""
    with own_generator(config):
        torch.manual_seed(int(fold(config, INIT)[0]))
        pixels = config.height * config.width
        model = config.recipe.build(pixels, config.levels, **config.options)
    return model.to(config.device)


def load(run: Path) -> tuple[Config, Any]:
    """Configuration and trained model of a run, on the CPU, in eval mode."""
    config = read_config(run)
    if not (run / CHECKPOINT).is_file():
        raise ValueError(f"{run} must hold {CHECKPOINT}; there is none yet, train first")
    model = build(dataclasses.replace(config, device="cpu"))
    header = checkpoint.restore(run / CHECKPOINT, model)
    turn = config.recipe.turn(config.steps)
    if header["step"] <= turn:
        raise ValueError(
            f"{run} is at step {header['step']}, and what samples is trained from step {turn} on; "
            "go on with train --resume"
        )
    return config, model.eval()


@torch.no_grad()
def sample(config: Config, model: Any, n: int, seed: noise.Seed, **options: Any) -> Tensor:
    """n samples of a model in eval mode as pictures, [n, height, width] in [0, 1], on the CPU.

    Of a model of points, [n, 2]; of text, ids [n, T], which begin with the prompt. A model that
    translates is given n pictures of the test part, chosen by the seed; ValueError if there are
    fewer.
    options: of the model's sample(): label, guidance, sampler, steps; of text prompt, a string (a
        new line, where the vocabulary has it), tokens (500), temperature, top_k, top_p. Where
        complete is true, the first n test pictures, the lower half of each drawn.
    """
    if config.vocabulary:
        begin = "\n" if "\n" in config.vocabulary else config.vocabulary[0]
        prompt = text_data.encode(config.vocabulary, options.pop("prompt", begin))
        options = {"tokens": 500} | options
        return model.sample(n, seed=seed, prompt=prompt, **options).cpu()
    if config.recipe.translates:
        x = model.sample(_test_rows(config, model, n, seed)).float()
    elif options.pop("complete", False):
        x = model.complete(_upper_halves(config, n), seed=seed, **options).float()
    else:
        x = model.sample(n, seed=seed, **options).float()
    if not config.levels:
        return x.cpu()
    if model.takes == "levels":
        x = x / (config.levels - 1)
    return x.clamp(0, 1).view(n, config.height, config.width).cpu()


def _test_rows(config: Config, model: Any, n: int, seed: noise.Seed) -> Tensor:
    images = data.load(config.data)
    if n > len(images.test):
        raise ValueError(f"--n must be at most the {len(images.test)} test pictures, got {n}")
    key = noise.resolve_key("sample", seed, 0, None, torch.device("cpu"))
    index = data.batch_indices(len(images.test), n, seed=key, step=0)
    return model_input(config, model, images, images.test[index])


def _upper_halves(config: Config, n: int) -> Tensor:
    """Of the first n test pictures, [n, D / 2]. Raises ValueError if there are not as many."""
    x = data.load(config.data).test
    if n > len(x):
        raise ValueError(f"--n must be at most the {len(x)} test pictures to complete, got {n}")
    return x[:n, : config.height // 2 * config.width].to(config.device).long()


def save_samples(path: Path, config: Config, model: Any, x: Tensor, **options: Any) -> None:
    """Writes what sample() gave as a PNG: a grid of pictures, or points over their density, if the
    model has one.

    Of text, as text. options: as in sample().
    """
    if config.vocabulary:
        checkpoint.write_atomically(path, written(config, x).encode())
        return
    if config.levels:
        pictures.save_grid(path, x)
        return
    if model.log_prob_kind == "none":
        pictures.save_points(path, x)
        return
    label = options.get("label")

    @torch.no_grad()
    def log_prob(points: Tensor) -> Tensor:
        labels = None if label is None else torch.full((len(points),), label)
        return model.log_prob(points.to(config.device), labels).cpu()

    pictures.save_points(path, x, log_prob)


def written(config: Config, ids: Tensor) -> str:
    """Texts of ids [n, T], each with a line end after it, a line of dashes between two."""
    texts = [text_data.decode(config.vocabulary, row) + "\n" for row in ids]
    return f"{'-' * 40}\n".join(texts)


def own_generator(config: Config) -> AbstractContextManager[None]:
    """Gives torch's generators back as they were. devices= spares a warning with many GPUs."""
    return torch.random.fork_rng(devices=[0] if config.device == "cuda" else [])


def fold(config: Config, use: int) -> Tensor:
    """The key of one use of the run's seed: DEFAULTS: dict[str, Any] = {
        "data": "digits",
        "steps": 2000,
        "batch_size": 100,
        "lr": 5e-3,
        "weight_decay": 1e-2,
        "seed": 0,
        "every": 200,
        "device": "cpu",
    }  # settings of a run, below its recipe's own
    BATCHES, STEPS, TEST, INIT or DRAWN."""
    return noise.fold_in(noise.key(config.seed), use)


def model_input(config: Config, model: Any, images: data.Data, x: Tensor) -> Tensor:
    """Rows x of the data as the model takes them, on the run's device."""
    x = x.to(config.device)
    if model.takes == "levels" or isinstance(images, data.Text):
        return x.long()
    return images.unit(x)
