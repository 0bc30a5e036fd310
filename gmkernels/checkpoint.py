"""Files that are whole or absent: atomic writes, and a model with its optimizer in one of them.

A checkpoint is a safetensors file: `model.<name>` for the state dict, `optimizer.<parameter>.<key>`
for each tensor of the optimizer's state, JSON in the header.
"""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

_HEADER = "gmkernels"  # one entry only: safetensors writes several in no fixed order


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a kill at any time leaves the old one or the new one, whole.

    The bytes go to a temporary file in the same folder, reach the disk, and take the name over.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, header: dict[str, Any]
) -> None:
    """Writes model, optimizer and header atomically; equal states give equal bytes.

    Args:
        optimizer: over model.parameters(), with a state of tensors only (SGD, Adam, AdamW, ...).
        header: what JSON holds, such as the step.
    """
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{names[i]}.{key}": x for key, x in state.items()}
    # Clones, since safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
    text = json.dumps(header, sort_keys=True)
    write_atomically(path, safetensors.torch.save(tensors, {_HEADER: text}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a checkpoint. Raises ValueError for a damaged or foreign one."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            # Clones own aligned memory; the file's mapping ends with the block.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except KeyError as error:
        raise ValueError(
            f"{path} is not a checkpoint of gmkernels: its header is missing"
        ) from error
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it or restore a copy") from error
    return tensors, header


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Puts a checkpoint into a model, and an optimizer over its parameters; returns the header.

    Raises ValueError if the file is damaged, or its tensors are not the model's by name and shape.
    """
    tensors, header = read(path)
    state = _under(tensors, "model.")
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in state.items()}
    if found != expected:
        odd = sorted(name for name, _ in found.items() ^ expected.items())
        raise ValueError(
            f"{path} must hold this model's tensors; {odd[0]} is {found.get(odd[0], 'missing')} "
            f"there, {expected.get(odd[0], 'missing')} in the model"
        )
    model.load_state_dict(state)
    if optimizer is not None:
        names = [name for name, _ in model.named_parameters()]
        rows = {i: _under(tensors, f"optimizer.{name}.") for i, name in enumerate(names)}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(
            {"state": {i: row for i, row in rows.items() if row}, "param_groups": groups}
        )
    return header


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
