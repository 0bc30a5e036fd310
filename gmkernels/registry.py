"""All rows, found by folder: `python -m gmkernels.registry` prints the README's table of ops."""

import importlib
from pathlib import Path

from gmkernels.spec import Op


def rows() -> tuple[Op, ...]:
    """Every Op row of every family, families in alphabetical order."""
    folder = Path(__file__).parent / "ops"
    families = sorted(p.parent.name for p in folder.glob("*/spec.py"))
    found = [importlib.import_module(f"gmkernels.ops.{family}.spec").OPS for family in families]
    return tuple(op for ops in found for op in ops)


def row(name: str) -> Op:
    """The row of that name; raises KeyError with the names there are."""
    found = {op.name: op for op in rows()}
    if name not in found:
        raise KeyError(f"no op is called {name!r}; there are {', '.join(found)}")
    return found[name]


def table() -> str:
    """The op table of the README, in Markdown."""
    lines = ["| op | what it computes | source |", "|---|---|---|"]
    lines += [f"| `{op.name}` | {op.summary} | {op.source} |" for op in rows()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
