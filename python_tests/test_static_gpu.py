"""The static report: the readers of machine code, its faults."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cuda_check, static_asm, static_gpu

ROOT = Path(__file__).resolve().parents[1]
SASS = """
        Function : tiny
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/              @!P1 BRA 0x60 ;
        /*0030*/                   MOV R4, 0x50 ;
        /*0040*/                   CALL.REL.NOINC 0xc0 ;
        /*0050*/                   MOV R5, R0 ;
        /*0060*/                   LDG.E.128 R8, desc[UR6][R2.64] ;
        /*0070*/                   FADD R8, R8, R9 ;
        /*0080*/                   STG.E.64 desc[UR6][R2.64+0x8], R8 ;
        /*0090*/               @P0 BRA 0x60 ;
        /*00a0*/                   STL [R1], R8 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   RET.REL.NODEC R4 0x0 ;
        /*00d0*/                   BRA 0xd0;
"""
USAGE = " Function tiny:\n  REG:28 STACK:0 SHARED:1024 LOCAL:8 CONSTANT[0]:392"
AMD = """
	.globl	tiny
tiny:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:
	global_load_dwordx4 v[0:3], v4, s[2:3]
	s_cbranch_execz .LBB0_1
.LBB0_2:
	v_add_f32_e32 v0, v0, v1
	global_store_short v4, v0, s[2:3]
	s_cbranch_vccnz .LBB0_3
	s_cbranch_scc1 .LBB0_1
	s_endpgm
.LBB0_3:
	v_mov_b32_e32 v0, v1
	s_branch .LBB0_1
	s_endpgm
    .vgpr_count:     17
    .vgpr_spill_count: 3
"""


def test_sass_is_read() -> None:
    (kernel,) = static_asm.parse_sass(SASS, USAGE)
    assert (kernel.name, kernel.registers, kernel.shared) == ("tiny", 28, 1024)
    assert [i.opcode for i in kernel.hot] == ["LDG.E.128", "FADD", "STG.E.64", "BRA"]
    assert (kernel.widths("load"), kernel.widths("store")) == ((128,), (64,))
    assert kernel.loops
    assert kernel.spills == 1
    straight = SASS.replace("@P0 BRA 0x60", "NOP")
    (kernel,) = static_asm.parse_sass(straight, USAGE)
    assert not kernel.loops
    assert len(kernel.hot) == 8  # neither the slow path, nor what is behind EXIT, nor NOP


def test_code_is_read_where_a_stack_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a stack nothing can spill, and the instructions need not be read."""
    usage, asked = USAGE, []

    def cuobjdump(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[1])
        text = SASS if command[1] == "-sass" else usage
        return subprocess.CompletedProcess(command, 0, text, "")

    monkeypatch.setattr(static_asm, "tool", lambda name: name)
    monkeypatch.setattr(static_asm.subprocess, "run", cuobjdump)
    (kernel,) = static_asm.read_cubin(Path("tiny.cubin"), code=False)
    assert kernel.spills == 1
    usage = USAGE.replace("LOCAL:8", "LOCAL:0")
    (kernel,) = static_asm.read_cubin(Path("tiny.cubin"), code=False)
    assert (kernel.name, kernel.registers, kernel.shared) == ("tiny", 28, 1024)
    assert (kernel.code, kernel.spills) == ((), 0)
    assert len(static_asm.read_cubin(Path("tiny.cubin"), code=True)[0].code) == 14
    usage = USAGE.replace("LOCAL:8", "LOCAL:0").replace("STACK:0", "STACK:8")
    assert static_asm.read_cubin(Path("tiny.cubin"), code=False)[0].spills == 1
    assert asked.count("-sass") == 3


def test_amd_assembly_is_read() -> None:
    kernel = static_asm.parse_amdgcn(AMD)
    assert (kernel.name, kernel.registers, kernel.spills) == ("tiny", 17, 3)
    # One loop of four blocks: the jump to its head from the middle is not a loop of its own.
    assert [i.opcode for i in kernel.hot][-2:] == ["v_mov_b32_e32", "s_branch"]
    assert len(kernel.hot) == 8
    assert (kernel.widths("load"), kernel.widths("store")) == ((128,), (16,))


def test_a_jump_back_into_straight_code_is_no_loop() -> None:
    jumps = SASS.replace("@P0 BRA 0x60", "BRA 0xb0").replace("STL [R1], R8", "BRA 0x60")
    skips = jumps.replace("@!P1 BRA 0x60", "@!P1 BRA 0xa0")
    (kernel,) = static_asm.parse_sass(skips, USAGE)
    assert not kernel.loops


def test_static_report(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    run = [sys.executable, "-m", "benchmarks.static_gpu", "--op", "uniform"]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "build/static_gpu.csv").open(newline="") as file:
        lines = {(x["target"], x["dtype"]): x for x in csv.DictReader(file)}
    hopper = lines["sm_90", "float32"]
    assert {target for target, _ in lines} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert hopper["store_bits"] == "128"
    assert hopper["spills"] == "0"
    assert 5 < float(hopper["per_element"]) <= float(hopper["ceiling"])
    assert hopper["bound_by"] == "memory"


def test_static_report_fails_on_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    line = static_gpu.Line("op", "forward", "", "sm_90", "k", 32, 0, 0, "", "", 400, 50.0, 50)

    def status(**changes: Any) -> int:
        lines = [line, dataclasses.replace(line, **changes)]
        monkeypatch.setattr(static_gpu, "report_families", lambda rows, console: lines)
        return static_gpu.main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["static_gpu", "--op", "uniform"])
    monkeypatch.setattr(static_gpu, "OUT", tmp_path / "report.csv")
    assert status() == 0
    assert status(ceiling=40) == 1
    assert "more than 40 instructions an element" in capsys.readouterr().out
    assert status(target="sm_80", spills=2) == 1
    assert "spills registers" in capsys.readouterr().out
    monkeypatch.setitem(cuda_check.SPILLS_ALLOWED, "k", "shown here")
    assert status(spills=2) == 0


PTXAS = """ptxas info    : Compiling entry function '_Z4tinyv' for 'sm_90a'
    {stack} bytes stack frame, {stack} bytes spill stores, 4 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
"""


def test_cuda_check_fails_on_a_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    said = PTXAS.format(stack=8)
    monkeypatch.setattr(cuda_check, "compile_one", lambda *task: (Path("a.cubin"), 0, said))
    kernels, complaints = cuda_check.check("nvcc")
    (name,) = kernels
    assert kernels[name] == dict.fromkeys(cuda_check.ARCHS, (24, 12))
    assert complaints == [f"{name} spills, and SPILLS_ALLOWED does not say why"]
    monkeypatch.setitem(cuda_check.SPILLS_ALLOWED, name, "shown here")
    assert cuda_check.check("nvcc")[1] == []
    monkeypatch.setattr(cuda_check, "compile_one", lambda *task: (Path("a.cubin"), 1, "no such"))
    assert all("does not compile" in text for text in cuda_check.check("nvcc")[1])
    assert cuda_check.check("nvcc")[1]
