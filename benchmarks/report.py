"""The table, the picture and the three lines at the end."""

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.record import Record
from benchmarks.sides import COMPILED, EAGER, OURS

_DRAWN = ((EAGER, "PyTorch", "#4c72b0"), (COMPILED, "torch.compile", "#dd8452"))


def groups(records: list[Record]) -> Iterator[tuple[tuple[str, ...], list[Record]]]:
    """The records of each row, in the order of measurement; those beside it come last."""
    order = {row: n for n, row in enumerate(dict.fromkeys(r.row for r in records))}
    ordered = sorted(records, key=lambda r: order[r.row])
    for row, group in itertools.groupby(ordered, key=lambda r: r.row):
        yield row, list(group)


def main_and_beside(group: list[Record]) -> tuple[list[Record], dict[str, Record]]:
    """The records of the row's own regime, and those of the other by side."""
    regime = group[0].regime
    return (
        [r for r in group if r.regime == regime],
        {r.side: r for r in group if r.regime != regime},
    )


def table(records: list[Record]) -> Table:
    """A block a row, a line a side."""
    regime = records[0].regime
    shown = Table(
        title="Times in ms: a fifth of the calls were faster than p20, half faster than p50, a "
        "fifth slower than p80.\n"
        "'ours is': how many times faster ours is than this side; below 1 it is slower.",
        caption=f"memory regime: {regime}; default: the same side where gmkernels.reuse_memory() "
        "was not called; small call: on 8 x 32 elements, of a loop one of its steps; of copy, or "
        "of reading alone (read) where a call hardly writes",
    )
    for name in ("row", "side"):
        shown.add_column(name, no_wrap=True)
    for name in ("p20", "p50", "p80", "ours is", "GB/s", "of copy", "of matmul"):
        shown.add_column(name, justify="right")
    for name in ("memory MiB", "small call µs", "default p50", "default: ours is"):
        shown.add_column(name, justify="right")
    for row, group in groups(records):
        own, beside = main_and_beside(group)
        title = list(dict.fromkeys(part for part in (*row[:2], f"{row[2]} {row[3]}") if part))
        title += [""] * (len(own) - len(title))
        for first, record in itertools.zip_longest(title, own):
            if record is None:
                shown.add_row(first)
            else:
                shown.add_row(first, *_cells(record, beside.get(record.side)))
        shown.add_section()
    return shown


def _cells(record: Record, beside: Record | None) -> list[str]:
    if record.p50_ms is None:
        return [record.side, f"[red]{record.correct}[/red]"]
    share = "" if record.share_of_copy is None else f"{record.share_of_copy:.0%}"
    if record.share_of_read is not None:
        share = f"read {record.share_of_read:.0%}"
    matmul = "" if record.share_of_matmul is None else f"{record.share_of_matmul:.0%}"
    return [
        f"[bold]{record.side}[/bold]" if record.side == OURS else record.side,
        *(_number(x) for x in (record.p20_ms, record.p50_ms, record.p80_ms)),
        _ratio(record),
        _number(record.gb_per_s),
        share,
        matmul,
        _number(record.peak_memory_mb),
        _number(record.host_us),
        "" if beside is None else _number(beside.p50_ms),
        "" if beside is None else _ratio(beside),
    ]


def _number(x: float | None) -> str:
    """Three digits."""
    if x is None:
        return ""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _ratio(record: Record) -> str:
    if record.ratio_vs_ours is None or record.side == OURS:
        return ""
    colour = "green" if record.ratio_vs_ours >= 1 else "red"
    return f"[{colour}]{record.ratio_vs_ours:.2f}x[/{colour}]"


def ratios(records: list[Record], side: str) -> list[float]:
    """How many times faster ours is than that side, in each row of an op."""
    return [
        r.ratio_vs_ours
        for r in records
        if r.side == side and r.ratio_vs_ours is not None and r.direction not in ("step", "loop")
    ]


def summary(records: list[Record], machine: str, left_out: list[str]) -> list[str]:
    """Three plain lines, and a fourth that names what no time was left for."""
    own = [r for _, group in groups(records) for r in main_and_beside(group)[0]]
    rows = {r.row for r in own}
    wrong = {r.row for r in own if r.correct.startswith("WRONG")}
    state = f"{len(wrong)} of them WRONG, without a number" if wrong else "all values right"
    first = f"{len(rows)} rows on {machine}: {state} (held against float64 before timing)."
    parts = []
    for side, name in ((EAGER, "plain PyTorch"), (COMPILED, "torch.compile")):
        found = ratios(own, side)
        if found:
            lost = sum(x < 1 for x in found)
            parts.append(
                f"{statistics.median(found):.1f}x as fast as {name} in the median ("
                f"{min(found):.1f}x to {max(found):.1f}x; slower in {lost} of {len(found)} rows)"
            )
    second = f"The fused kernels are {', and '.join(parts)}." if parts else "No kernel was timed."
    steps = [r for r in own if r.direction == "step" and r.side == EAGER and r.ratio_vs_ours]
    third = "; ".join(
        f"a {r.op} ({r.case}) takes {r.p50_ms / (r.ratio_vs_ours or 1):.2f} ms in place of "
        f"{r.p50_ms:.2f} ms ({r.ratio_vs_ours:.2f}x)"
        for r in steps
        if r.p50_ms
    )
    third = third or "no model was timed"
    lines = [first, second, f"{third[0].upper()}{third[1:]}."]
    return [*lines, f"Left out for time: {'; '.join(left_out)}."] if left_out else lines


def plot(path: Path, records: list[Record], machine: str) -> None:
    """A bar for each row and baseline: how many times faster ours is, on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = []
    for row, group in groups(records):
        found = {r.side: r.ratio_vs_ours for r in main_and_beside(group)[0] if r.ratio_vs_ours}
        if found:
            rows.append((f"{row[0]}\n{row[1]}, {row[2]}, {row[3]}", found))
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.75 * max(len(rows), 1)), layout="constrained")
    for n, (side, label, colour) in enumerate(_DRAWN):
        at = [(i + 0.38 * n, found[side]) for i, (_, found) in enumerate(rows) if side in found]
        if not at:
            continue
        places, values = zip(*at, strict=True)
        bars = axes.barh(places, [v - 1 for v in values], 0.36, left=1, color=colour, label=label)
        axes.bar_label(bars, [f" {v:.1f}x " for v in values], fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.15)
    axes.set_yticks([i + 0.19 for i in range(len(rows))], [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    ticks = [t for t in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100) if _within(t, axes.get_xlim())]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("how many times faster gmkernels is; left of 1 it is slower")
    axes.set_title(f"gmkernels against PyTorch on {machine}")
    if rows:
        axes.legend(title="against", loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _within(x: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= x <= limits[1]


def show(console: Console, records: list[Record], machine: str, left_out: list[str]) -> None:
    """Prints the table and the summary."""
    if records:
        console.print(table(records))
    for line in summary(records, machine, left_out):
        console.print(line, highlight=False)
