"""Training and sampling of every model: a loop that resumes at the same bits, pictures.

All randomness is a function of (config.seed, step): keys folded from the seed give the batches, the
model's own noise, and the seed of torch's generator (dropout), set anew at each step. A run folder
holds config.json, metrics.csv, checkpoint.safetensors and samples.png, each written atomically.
"""

import csv
import dataclasses
import io
import json
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gmkernels import checkpoint, data, noise, pictures
from gmkernels.recipes import RECIPES, option_defaults

CONFIG, METRICS, CHECKPOINT, SAMPLES = (
    "config.json",
    "metrics.csv",
    "checkpoint.safetensors",
    "samples.png",
)
COLUMNS = ("step", "loss", "test_nats")
WARMUP = 50  # steps
SCALE_ROWS = 1000  # train images that the scale of latents is measured on
_BATCHES, _STEPS, _TEST, _INIT, _SAMPLES = range(5)  # what the seed is folded with


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


def read_config(run: Path) -> Config:
    """The configuration of a run folder. Raises ValueError with what is wrong."""
    path = run / CONFIG
    if not path.is_file():
        raise ValueError(f"{run} must be the folder of a run, with {CONFIG}; there is none")
    try:
        config = Config(**json.loads(path.read_text()))
        known = option_defaults(RECIPES[config.model].build)
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
    with _own_generator(config):
        torch.manual_seed(int(_fold(config, _INIT)[0]))
        pixels = config.height * config.width
        model = RECIPES[config.model].build(pixels, config.levels, **config.options)
    return model.to(config.device)


def load(run: Path) -> tuple[Config, Any]:
    """Configuration and trained model of a run, on the CPU, in eval mode."""
    config = read_config(run)
    if not (run / CHECKPOINT).is_file():
        raise ValueError(f"{run} must hold {CHECKPOINT}; there is none yet, train first")
    model = build(dataclasses.replace(config, device="cpu"))
    header = checkpoint.restore(run / CHECKPOINT, model)
    turn = RECIPES[config.model].turn(config.steps)
    if header["step"] <= turn:
        raise ValueError(
            f"{run} is at step {header['step']}, and what samples is trained from step {turn} on; "
            "go on with train --resume"
        )
    return config, model.eval()


def learning_rate(config: Config, step: int, first: int = 0, end: int | None = None) -> float:
    """A linear warm-up from step `first`, then half a cosine down to 0 at `end`, all the steps."""
    warm, end = min(1.0, (step - first + 1) / WARMUP), config.steps if end is None else end
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * (step - first) / (end - first)))


def training_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    *,
    seed: noise.Seed = None,
    **conditions: Tensor,
) -> Tensor:
    """One update on a batch x; returns the loss, a scalar tensor, detached."""
    optimizer.zero_grad()
    loss = model.loss(x, seed=seed, **conditions)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def test_nats(config: Config, model: Any, images: data.Images | data.Points) -> float:
    """Mean over the test images of the recipe's nll, with the same noise at each call.

    Leaves the model in eval mode.
    """
    key = _fold(config, _TEST)
    model.eval()
    total = 0.0
    for start in range(0, len(images.test), 500):
        x = _input(config, model, images, images.test[start : start + 500])
        rows = RECIPES[config.model].nll(model, x, noise.key(key, offset=start))
        total += float(rows.double().sum())
    return total / len(images.test)


def fit(run: Path, config: Config, model: Any, images: data.Images | data.Points) -> float:
    """Trains from the run's checkpoint, or from the start, to config.steps; returns the test nats.

    A recipe of two stages trains a part of the model first, then the rest with what that part has
    come to; a run that goes on from before the turn makes it again. A run that was killed and goes
    on ends at the same bits as one that was not, on the same machine, torch and number of threads.
    Raises FloatingPointError where the loss is no longer finite; the last checkpoint stays.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    done, rows = 0, []
    if (run / CHECKPOINT).is_file():
        header = checkpoint.restore(run / CHECKPOINT, model, optimizer)
        done, rows = header["step"], header["metrics"]
        _write_metrics(run, rows)
    batches, steps = _fold(config, _BATCHES), _fold(config, _STEPS)
    total = torch.zeros((), device=config.device)
    recipe = RECIPES[config.model]
    bar = tqdm(total=config.steps, initial=done, unit="step", disable=None)
    with _own_generator(config), bar:
        for step in range(done, config.steps):
            index = data.batch_indices(
                len(images.train), config.batch_size, seed=batches, step=step
            )
            x = _input(config, model, images, images.train[index])
            key = noise.fold_in(steps, step)
            torch.manual_seed(int(key[0]))
            part, first, end = recipe.stage(model, config.steps, step)
            part.train()
            if 0 < first == step:
                x1 = images.train[:SCALE_ROWS]
                model.measure_scale(_input(config, model, images, x1), seed=key)
                total.zero_()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, first, end)
            labels = _labels(config, images.train_labels, index) if part is model else {}
            total += training_step(part, optimizer, x, seed=key, **labels)
            bar.update()
            done = step + 1
            if done % config.every == 0 or done == config.steps:
                loss = float(total) / (done - max(first, (done - 1) // config.every * config.every))
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss is {loss} at step {done}; try a lower --lr than {config.lr}"
                    )
                nats = test_nats(config, model, images)
                rows.append([done, loss, nats])
                header = {"step": done, "metrics": rows}
                checkpoint.save(run / CHECKPOINT, model, optimizer, header)
                _write_metrics(run, rows)
                bar.set_postfix(loss=f"{loss:.2f}", test=f"{nats:.2f}")
                total.zero_()
    n = 64 if config.levels else 1000
    x = sample(config, model.eval(), n, _fold(config, _SAMPLES))
    save_samples(run / SAMPLES, config, model, x)
    return rows[-1][2]


@torch.no_grad()
def sample(config: Config, model: Any, n: int, seed: noise.Seed, **options: Any) -> Tensor:
    """n samples of a model in eval mode as pictures, [n, height, width] in [0, 1], on the CPU.

    Of a model of points, [n, 2].
    options: of the model's sample(): label, guidance, sampler, steps.
    """
    x = model.sample(n, seed=seed, **options).float()
    if not config.levels:
        return x.cpu()
    if model.takes == "levels":
        x = x / (config.levels - 1)
    return x.clamp(0, 1).view(n, config.height, config.width).cpu()


def save_samples(path: Path, config: Config, model: Any, x: Tensor, **options: Any) -> None:
    """Writes what sample() gave as a PNG: a grid of pictures, or points over their density.

    options: as in sample().
    """
    if config.levels:
        pictures.save_grid(path, x)
        return
    label = options.get("label")

    @torch.no_grad()
    def log_prob(points: Tensor) -> Tensor:
        labels = None if label is None else torch.full((len(points),), label)
        return model.log_prob(points.to(config.device), labels).cpu()

    pictures.save_density(path, x, log_prob)


def _own_generator(config: Config) -> AbstractContextManager[None]:
    """Gives torch's generators back as they were. devices= spares a warning with many GPUs."""
    return torch.random.fork_rng(devices=[0] if config.device == "cuda" else [])


def _fold(config: Config, use: int) -> Tensor:
    return noise.fold_in(noise.key(config.seed), use)


def _input(config: Config, model: Any, images: data.Images | data.Points, x: Tensor) -> Tensor:
    x = x.to(config.device)
    return x.long() if model.takes == "levels" else images.unit(x)


def _labels(config: Config, labels: Tensor | None, index: Tensor) -> dict[str, Tensor]:
    """The batch's labels where the model takes them and the data have them."""
    if labels is None or not RECIPES[config.model].labelled or not config.options["classes"]:
        return {}
    return {"label": labels[index].to(config.device)}


def _write_metrics(run: Path, rows: list[list[float]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    checkpoint.write_atomically(run / METRICS, text.getvalue().encode())
