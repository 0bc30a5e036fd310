"""Training of every model: one loop, which resumes at the same bits."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gmkernels import checkpoint, data, noise, runs

WARMUP = 50  # steps
TURN_ROWS = 1000  # train images that are shown between two stages


def learning_rate(config: runs.Config, step: int, first: int = 0, end: int | None = None) -> float:
    """A linear warm-up from step `first`; then half a cosine down to 0 at `end`, all the steps.

    Of a recipe without cosine: constant after the warm-up.
    """
    warm, end = min(1.0, (step - first + 1) / WARMUP), config.steps if end is None else end
    if not config.recipe.cosine:
        return config.lr * warm
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * (step - first) / (end - first)))


def optimizer_of(config: runs.Config, model: Any) -> torch.optim.Optimizer:
    """AdamW with the run's settings."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.recipe.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


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
def test_score(config: runs.Config, model: Any, images: data.Data) -> float:
    """Mean over the test part of the recipe's score, with the same noise at each call.

    Of text, over its characters: all that follow another.

    Leaves the model in eval mode.
    """
    key = runs.fold(config, runs.TEST)
    model.eval()
    total = 0.0
    for start, x in images.test_batches():
        x = runs.model_input(config, model, images, x)
        rows = config.recipe.score(model, x, noise.key(key, offset=start))
        total += float(rows.double().sum())
    return total / images.test_size


def fit(run: Path, config: runs.Config, model: Any, images: data.Data) -> float:
    """Trains from the run's checkpoint, or from the start, to config.steps; returns the test score.

    A recipe of two stages trains a part of the model first, then the rest with what that part has
    come to; a run that goes on from before the turn makes it again. A run that was killed and goes
    on ends at the same bits as one that was not, on the same machine, torch and number of threads.
    Raises FloatingPointError where the loss is no longer finite; the last checkpoint stays.
    """
    recipe = config.recipe
    optimizer = optimizer_of(config, model)
    done, rows = 0, []
    if (run / runs.CHECKPOINT).is_file():
        header = checkpoint.restore(run / runs.CHECKPOINT, model, optimizer)
        done, rows = header["step"], header["metrics"]
        _write_metrics(run, recipe.measure, rows)
    batches, steps = runs.fold(config, runs.BATCHES), runs.fold(config, runs.STEPS)
    total = torch.zeros((), device=config.device)
    bar = tqdm(total=config.steps, initial=done, unit="step", disable=None)
    with runs.own_generator(config), bar:
        for step in range(done, config.steps):
            x, labels = images.batch(config.batch_size, seed=batches, step=step)
            x = runs.model_input(config, model, images, x)
            key = noise.fold_in(steps, step)
            torch.manual_seed(int(key[0]))
            part, first, end = recipe.stage(model, config.steps, step)
            part.train()
            if 0 < first == step:
                x1 = images.train[:TURN_ROWS]
                if recipe.turned is not None:
                    recipe.turned(model, runs.model_input(config, model, images, x1), key)
                total.zero_()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, first, end)
            conditions = conditions_of(config, labels) if part is model else {}
            update = recipe.update or training_step
            total += update(part, optimizer, x, seed=key, **conditions)
            bar.update()
            done = step + 1
            if done % config.every == 0 or done == config.steps:
                loss = float(total) / (done - max(first, (done - 1) // config.every * config.every))
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss is {loss} at step {done}; try a lower --lr than {config.lr}"
                    )
                score = test_score(config, model, images)
                rows.append([done, loss, score])
                header = {"step": done, "metrics": rows}
                checkpoint.save(run / runs.CHECKPOINT, model, optimizer, header)
                _write_metrics(run, recipe.measure, rows)
                bar.set_postfix(loss=f"{loss:.4g}", test=f"{score:.4g}")
                total.zero_()
    x = drawn(config, model.eval(), images)
    runs.save_samples(run / config.samples, config, model, x)
    return rows[-1][2]


def drawn(config: runs.Config, model: Any, images: data.Data) -> Tensor:
    """Samples of a trained model; the recipe's picture of a model that has none."""
    key, picture = runs.fold(config, runs.DRAWN), config.recipe.picture
    if picture is None:
        most = images.test_size if config.recipe.translates else config.draws
        return runs.sample(config, model, min(config.draws, most), key)
    x = picture(model, runs.model_input(config, model, images, images.test), key)
    return x.float().clamp(0, 1).view(-1, config.height, config.width).cpu()


def conditions_of(config: runs.Config, labels: Tensor | None) -> dict[str, Tensor]:
    """The batch's labels where the model takes them and the data have them."""
    if labels is None or "label" not in config.recipe.asks or not config.options["classes"]:
        return {}
    return {"label": labels.to(config.device)}


def _write_metrics(run: Path, measure: str, rows: list[list[float]]) -> None:
    text = io.StringIO()
    columns = ("step", "loss", f"test_{measure.replace(' ', '_')}")
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    checkpoint.write_atomically(run / runs.METRICS, text.getvalue().encode())
