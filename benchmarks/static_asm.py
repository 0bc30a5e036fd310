"""Reads GPU assembly: instructions, loops, spills and access widths of kernels. Needs no GPU.

The hot body of a kernel is its innermost loop, or all of it where there is none. Slow paths are
left out: subroutines behind the last EXIT, and the blocks that call them (roots of subnormals,
divisions of large integers).
"""

import functools
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
_STOPS = ("BRA", "BRX", "JMP", "EXIT", "RET", "s_branch", "s_endpgm", "s_setpc")


@dataclass(frozen=True)
class Instruction:
    """One instruction. `target` is where a branch goes; `conditional`, whether it may go on."""

    address: int
    opcode: str
    conditional: bool = False
    target: int | None = None

    def is_a(self, *names: str) -> bool:
        return self.opcode.startswith(names)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: its instructions in order, and what it takes of the machine.

    Without instructions, it was read for the rest alone, and its stack is empty: nothing spills.
    """

    name: str
    code: tuple[Instruction, ...]
    registers: int
    shared: int
    amd_spills: int = 0

    @property
    def spills(self) -> int:
        """Registers stored to local memory and loaded back: instructions that do so."""
        return self.amd_spills or sum(i.is_a("STL", "LDL", "scratch_") for i in self.code)

    @functools.cached_property
    def loops(self) -> bool:
        """Whether the hot body is a loop."""
        return len(self.hot) < len(_flat(_Flow(self.code).blocks))

    @functools.cached_property
    def hot(self) -> tuple[Instruction, ...]:
        """The innermost loop that does most, or the whole kernel, without slow paths."""
        flow = _Flow(self.code)
        loops = flow.loops()
        inner = [a for a in loops if not any(b < a for b in loops)]
        bodies = [_flat([flow.blocks[n] for n in sorted(body)]) for body in inner]
        return max(bodies, key=len, default=_flat(flow.blocks))

    def widths(self, kind: str) -> tuple[int, ...]:
        """Bits of each global access of the hot body; kind is "load" or "store"."""
        return tuple(w for i in self.hot if (w := _width(i.opcode, kind)))


Block = tuple[Instruction, ...]


def _flat(blocks: list[Block]) -> Block:
    return tuple(i for block in blocks for i in block if not i.is_a("NOP", "s_nop"))


class _Flow:
    """Basic blocks of a kernel up to its last EXIT, without slow paths, and who follows whom."""

    def __init__(self, code: tuple[Instruction, ...]) -> None:
        ends = [n for n, i in enumerate(code) if i.is_a("EXIT", "s_endpgm")]
        code = code[: ends[-1] + 1] if ends else code
        targets = {i.target for i in code}
        self.blocks: list[Block] = []
        after_call = False
        for block in _blocks(code, targets):
            calls = any(i.is_a("CALL") and (i.target or 0) > code[-1].address for i in block)
            returns = after_call and block[0].address not in targets
            after_call = calls
            if not calls and not returns:
                self.blocks.append(block)
        at = {block[0].address: n for n, block in enumerate(self.blocks)}
        self.next: list[set[int]] = []
        for n, block in enumerate(self.blocks):
            last = block[-1]
            found = {at[last.target]} if last.target in at else set()
            if (last.conditional or not last.is_a(*_STOPS)) and n + 1 < len(self.blocks):
                found.add(n + 1)
            self.next.append(found)

    def reach(self, start: int, without: int | None, edges: list[set[int]]) -> set[int]:
        """Blocks that a path from `start` comes to, if it may not enter one."""
        found, waiting = {start} - {without}, [start] if start != without else []
        while waiting:
            new = edges[waiting.pop()] - found - {without}
            found |= new
            waiting += new
        return found

    def loops(self) -> list[frozenset[int]]:
        """The blocks of each loop: an edge back to a block without which there is no way to it."""
        before: list[set[int]] = [set() for _ in self.blocks]
        for n, following in enumerate(self.next):
            for m in following:
                before[m].add(n)
        bodies: dict[int, set[int]] = {}
        for n, following in enumerate(self.next):
            for head in following:
                if n == head or n not in self.reach(0, head, self.next):
                    body = {head} | self.reach(n, head, before)
                    bodies[head] = bodies.get(head, set()) | body
        return [frozenset(body) for body in bodies.values()]


def _blocks(code: tuple[Instruction, ...], targets: set[int | None]) -> Iterator[Block]:
    block: list[Instruction] = []
    for i in code:
        if block and i.address in targets:
            yield tuple(block)
            block = []
        block.append(i)
        if i.is_a(*_STOPS, "CALL", "s_cbranch"):
            yield tuple(block)
            block = []
    if block:
        yield tuple(block)


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


def read_cubin(path: Path, code: bool) -> list[Kernel]:
    """Every kernel of a cubin; without `code`, instructions are read only where a stack is used.

    Reading them takes as long as compiling a small kernel.
    """

    def dump(option: str) -> str:
        command = [tool("cuobjdump"), option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dump("-res-usage")
    if code or any(stack for _, _, stack in parse_usage(usage).values()):
        return parse_sass(dump("-sass"), usage)
    return [
        Kernel(name, (), registers, shared)
        for name, (registers, shared, _) in parse_usage(usage).items()
    ]


def read_cubin_bytes(cubin: bytes, code: bool) -> list[Kernel]:
    """Every kernel of a cubin in memory, as read_cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return read_cubin(path, code)


def parse_usage(usage: str) -> dict[str, tuple[int, int, int]]:
    """{kernel: (registers, bytes of shared memory, bytes of stack)} of cuobjdump -res-usage."""
    pattern = r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        name: (int(registers), int(shared), int(stack) + int(local))
        for name, registers, stack, shared, local in re.findall(pattern, usage)
    }


def parse_sass(sass: str, usage: str) -> list[Kernel]:
    """Kernels from what cuobjdump prints for -sass and for -res-usage."""
    resources = parse_usage(usage)
    kernels = []
    for part in sass.split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        code = []
        for address, predicate, opcode, operands in _SASS.findall(part):
            goes = opcode.startswith(("BRA", "CALL"))
            target = re.search(r"\b0x([0-9a-f]+)\s*$", operands) if goes else None
            where = int(target.group(1), 16) if target else None
            conditional = bool(predicate) or opcode.startswith(("BRA.U", "BRA.DIV"))
            code.append(Instruction(int(address, 16), opcode, conditional, where))
        kernels.append(Kernel(name, tuple(code), *resources[name][:2]))
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
        Instruction(n, opcode, opcode.startswith("s_cbranch"), labels.get(operands))
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
