"""Reads GPU assembly: instructions, loops, spills and access widths of kernels. Needs no GPU.

The hot body of a kernel is its innermost loop, or all of it where there is none. Slow paths are
left out: subroutines behind the last EXIT, and the blocks that call them (roots of subnormals).
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_AMD = re.compile(r"^\s+((?:[vs]|global|flat|ds|buffer|scratch)_\w+)\s*([^;]*)")
_AMD_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
_ENDS_BLOCK = ("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "s_cbranch", "s_branch", "s_endpgm")


@dataclass(frozen=True)
class Instruction:
    """One instruction. `target` is where a branch goes."""

    address: int
    opcode: str
    predicated: bool = False
    target: int | None = None

    def is_a(self, *names: str) -> bool:
        return self.opcode.startswith(names)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: its instructions in order, and what it takes of the machine."""

    name: str
    code: tuple[Instruction, ...]
    registers: int
    shared: int
    amd_spills: int = 0

    @property
    def spills(self) -> int:
        """Registers stored to local memory and loaded back: instructions that do so."""
        return self.amd_spills or sum(i.is_a("STL", "LDL", "scratch_") for i in self.code)

    def hot(self) -> tuple[Instruction, ...]:
        """The innermost loop that does most, or the whole kernel, without slow paths."""
        fast = self._fast()
        spans = [
            (i.target, i.address)
            for i in fast
            if i.target is not None and i.target < i.address and i.is_a("BRA", "s_cbranch")
        ]
        inner = [
            a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)
        ]
        bodies = [tuple(i for i in fast if start <= i.address <= end) for start, end in inner]
        return max(bodies, key=len, default=fast)

    @property
    def loops(self) -> bool:
        """Whether the hot body is a loop."""
        return len(self.hot()) < len(self._fast())

    def widths(self, kind: str) -> tuple[int, ...]:
        """Bits of each global access of the hot body; kind is "load" or "store"."""
        return tuple(w for i in self.hot() if (w := _width(i.opcode, kind)))

    def _fast(self) -> tuple[Instruction, ...]:
        ends = [n for n, i in enumerate(self.code) if i.is_a("EXIT", "s_endpgm")]
        reachable = self.code[: ends[-1] + 1] if ends else self.code
        kept: list[Instruction] = []
        after_call = False
        for block in _blocks(reachable):
            calls = any(i.is_a("CALL") for i in block)
            if not calls and not after_call:
                kept += block
            after_call = calls
        return tuple(i for i in kept if not i.is_a("NOP", "s_nop"))


def _blocks(code: tuple[Instruction, ...]) -> Iterator[list[Instruction]]:
    targets = {i.target for i in code}
    block: list[Instruction] = []
    for i in code:
        if block and i.address in targets:
            yield block
            block = []
        block.append(i)
        if i.is_a(*_ENDS_BLOCK):
            yield block
            block = []
    if block:
        yield block


def _width(opcode: str, kind: str) -> int:
    sass, amd = ("LDG", "load") if kind == "load" else ("STG", "store")
    if opcode.startswith(sass):
        found = re.search(r"\.[US]?(8|16|64|128)\b", opcode)
        return int(found.group(1)) if found else 32
    if re.match(rf"(global|flat|buffer)_{amd}_", opcode):
        return next((bits for name, bits in _AMD_WIDTHS.items() if name in opcode), 32)
    return 0


def tool(name: str) -> str:
    """Path of nvdisasm, cuobjdump or ptxas: the one that Triton brings, else the one on PATH."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in the triton package nor on PATH")
    return found


def read_cubin(path: Path) -> list[Kernel]:
    """Every kernel of a cubin."""
    sass, usage = (
        subprocess.run(
            [tool("cuobjdump"), option, str(path)], capture_output=True, text=True, check=True
        ).stdout
        for option in ("-sass", "-res-usage")
    )
    return parse_sass(sass, usage)


def read_cubin_bytes(cubin: bytes) -> list[Kernel]:
    """Every kernel of a cubin in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return read_cubin(path)


def parse_sass(sass: str, usage: str) -> list[Kernel]:
    """Kernels from what cuobjdump prints for -sass and for -res-usage."""
    resources = {
        name: (int(registers), int(shared))
        for name, registers, shared in re.findall(
            r"Function (\S+?):\s+REG:(\d+) .*?SHARED:(\d+)", usage
        )
    }
    kernels = []
    for part in sass.split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        code = []
        for address, predicate, opcode, operands in _SASS.findall(part):
            goes = opcode.startswith(("BRA", "CALL"))
            target = re.search(r"\b0x([0-9a-f]+)\s*$", operands) if goes else None
            where = int(target.group(1), 16) if target else None
            code.append(Instruction(int(address, 16), opcode, bool(predicate), where))
        kernels.append(Kernel(name, tuple(code), *resources.get(name, (0, 0))))
    return kernels


def parse_amdgcn(text: str) -> Kernel:
    """The one kernel of an AMD assembly listing."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            labels[label.group(1)] = len(lines)
        elif instruction := _AMD.match(line):
            lines.append((instruction.group(1), instruction.group(2).strip()))
    code = tuple(
        Instruction(n, opcode, False, labels.get(operands) if "branch" in opcode else None)
        for n, (opcode, operands) in enumerate(lines)
    )

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    name = re.search(r"\.globl\s+(\S+)", text)
    return Kernel(
        name.group(1) if name else "kernel",
        code,
        field("vgpr_count"),
        field("group_segment_fixed_size"),
        field("vgpr_spill_count") + field("sgpr_spill_count"),
    )
