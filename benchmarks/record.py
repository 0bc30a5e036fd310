"""One line of a results file, and the file."""

import csv
import dataclasses
import os
from pathlib import Path

SHARED = ("commit", "date", "versions", "machine", "threads")  # columns that all lines share


@dataclasses.dataclass(frozen=True)
class Record:
    """One side of one row in one allocation regime. None where it was not measured.

    Attributes:
        isa: instruction set of our CPU kernels; "" on a GPU.
        regime: "reuse" (gmkernels.reuse_memory() called at the start) or "default".
        ratio_vs_ours: this side's time over ours: above 1, ours is faster.
        gb_per_s: the row's minimal traffic over the time; share_of_copy: of the measured copy rate;
            share_of_read: of the rate of reading as many bytes, where a call hardly writes.
        gflop_per_s, share_of_matmul: likewise, of forwards with much arithmetic a byte.
        peak_memory_mb: MiB beyond the inputs, results included.
        host_us: microseconds of a call on 8 x 32 elements; of a loop, of a step on 1 x 4 x 8 x 8.
        share_of_faults: of the time, what the call's page faults cost: their number times a fault's
            measured cost; in the default regime on a CPU.
        correct: "yes", or what is wrong; then no number is given.
    """

    isa: str
    regime: str
    op: str
    case: str
    dtype: str
    direction: str
    side: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    ratio_vs_ours: float | None = None
    gb_per_s: float | None = None
    share_of_copy: float | None = None
    share_of_read: float | None = None
    gflop_per_s: float | None = None
    share_of_matmul: float | None = None
    peak_memory_mb: float | None = None
    host_us: float | None = None
    share_of_faults: float | None = None
    correct: str = "yes"

    @property
    def row(self) -> tuple[str, ...]:
        """What the sides of one comparison share."""
        return self.op, self.case, self.dtype, self.direction


COLUMNS = (*SHARED, *(f.name for f in dataclasses.fields(Record)))


def write(path: Path, stamp: dict[str, str], records: list[Record]) -> None:
    """Writes the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for record in records:
            values = [*(stamp[name] for name in SHARED), *dataclasses.astuple(record)]
            writer.writerow([f"{v:.5g}" if isinstance(v, float) else v for v in values])
    os.replace(partial, path)
