"""The build: what the shared object needs and says, and the package where a part is missing."""

import json
import re
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gmkernels
from gmkernels import dispatch

ROOT = Path(__file__).parent.parent
extension = dispatch.extension


def undefined_symbols(path: Path) -> list[str]:
    """Names that a 64-bit ELF file imports, as `nm --dynamic --undefined-only` prints them."""
    data = path.read_bytes()
    assert data[:5] == b"\x7fELF\x02", path
    order = "<" if data[5] == 1 else ">"
    table, size, count = (
        struct.unpack_from(order + form, data, at)[0]
        for form, at in (("Q", 0x28), ("H", 0x3A), ("H", 0x3C))
    )
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [
        struct.unpack_from(order + "IIQQQQIIQQ", data, table + i * size) for i in range(count)
    ]
    found = []
    for section in sections:
        if section[1] == 11:  # SHT_DYNSYM, linked to its string table
            strings = sections[section[6]][4]
            for at in range(section[4] + section[9], section[4] + section[5], section[9]):
                name, _, _, index = struct.unpack_from(order + "IBBH", data, at)
                if index == 0:  # SHN_UNDEF
                    end = data.index(b"\0", strings + name)
                    found.append(data[strings + name : end].decode())
    return found


def test_only_c_shims_are_imported() -> None:
    """No C++ symbol of torch: one build then serves every torch from 2.11 on."""
    torch_cpp = re.compile(r"_Z.*N[VKRO]*(3c10|2at|5torch|6caffe2)")  # mangled, nested names
    symbols = undefined_symbols(Path(extension.__file__))
    assert any(name.startswith("aoti_torch_") for name in symbols)
    assert [name for name in symbols if torch_cpp.match(name)] == []
    (binding,) = (Path(torch.__file__).parent / "lib").glob("libtorch_python.*")
    assert len([name for name in undefined_symbols(binding) if torch_cpp.match(name)]) > 1000


def test_build_info() -> None:
    info = extension.build_info()
    assert re.fullmatch(r"(GNU|Clang|AppleClang) \d+\.\d+.*", info["compiler"])
    assert info["objects"] in (["portable"], ["portable", "v3", "v4", "v4_bf16"])
    assert re.fullmatch(r"((sm|compute)_\d+a? ?)*", info["cuda_archs"])
    assert info["stable_abi_target"] == "2.11"
    assert info["version"] == gmkernels.__version__


def test_isas_follow_the_cpu(isas: list[str]) -> None:
    features, usable = extension.cpu_features(), ["portable"]
    if features.get("avx2") and features["fma"]:
        usable.append("v3")
        if all(features[f"avx512{part}"] for part in ("f", "bw", "dq", "vl")):
            usable.append("v4")
            if features["avx512bf16"]:
                usable.append("v4_bf16")
    assert isas == usable[: len(isas)]
    assert set(isas) <= set(extension.build_info()["objects"])
    assert extension.isa() == isas[-1]


@pytest.mark.parametrize("name", ["avx9", "", "V3", "v3 "])
def test_set_isa_refuses_nonsense(name: str, isas: list[str]) -> None:
    before = extension.isa()
    with pytest.raises(ValueError, match=f"this CPU and build run {', '.join(isas)}; got '{name}'"):
        extension.set_isa(name)
    with pytest.raises(ValueError, match="set_isa"), gmkernels.use_isa(name):
        pass
    assert extension.isa() == before


def test_use_isa_restores(isas: list[str]) -> None:
    before = extension.isa()
    with gmkernels.use_isa("portable"):
        assert extension.isa() == "portable"
        with gmkernels.use_isa(isas[-1]):
            assert extension.isa() == isas[-1]
        assert extension.isa() == "portable"
    assert extension.isa() == before
    with pytest.raises(KeyError), gmkernels.use_isa("portable"):
        raise KeyError
    assert extension.isa() == before


def test_set_isa_takes_effect(isas: list[str]) -> None:
    """The portable object has no fma, so that some of its exponentials round differently."""
    x = np.linspace(-20, 20, 10_001, dtype=np.float32)
    found = []
    for isa in isas:
        with gmkernels.use_isa(isa):
            found.append(extension.exp(x))
    assert all((found[0] != other).any() for other in found[1:])


WITHOUT = """
import json, sys, warnings
import torch  # before the block: a CUDA build of torch looks for Triton while it is imported

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in sys.argv[1:]:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import gmkernels
    drawn = gmkernels.normal((2, 5), seed=1)
refusals = {}
for backend in ("native", "triton"):
    try:
        gmkernels.normal(3, seed=1, backend=backend)
    except RuntimeError as error:
        refusals[backend] = str(error)
print(json.dumps({
    "warnings": [str(w.message) for w in caught if "gmkernels" in str(w.message)],
    "bits": drawn.view(torch.int32).tolist(),
    "explained": gmkernels.explain(gmkernels.normal, 3, seed=1),
    "refusals": refusals,
}))
"""


def run_without(*modules: str) -> dict:
    """What a fresh process reports in which these modules cannot be imported."""
    command = [sys.executable, "-c", WITHOUT, *modules]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    expected = gmkernels.normal((2, 5), seed=1, backend="reference").view(torch.int32)
    assert report["bits"] == expected.tolist()
    return report


def test_without_the_extension() -> None:
    report = run_without("gmkernels._C")
    assert len(report["warnings"]) == 1
    assert "the extension gmkernels._C is not built or does not load" in report["warnings"][0]
    assert "normal on cpu: reference" in report["explained"]
    assert "gmkernels._C is blocked" in report["refusals"]["native"]


def test_without_triton() -> None:
    report = run_without("triton")
    assert len(report["warnings"]) == 1
    assert "Triton is not installed (triton is blocked)" in report["warnings"][0]
    assert "normal on cpu: native" in report["explained"]
    assert "Triton is not installed (triton is blocked)" in report["refusals"]["triton"]


def test_without_both() -> None:
    report = run_without("gmkernels._C", "triton")
    assert len(report["warnings"]) == 2
    assert "normal on cpu: reference" in report["explained"]
    assert set(report["refusals"]) == {"native", "triton"}


def test_sources_are_globbed() -> None:
    """Adding an op edits no build file: none names a family or a file of one."""
    text = (ROOT / "CMakeLists.txt").read_text() + (ROOT / "setup.py").read_text()
    families = [path for path in (ROOT / "csrc").iterdir() if path.is_dir()]
    assert families
    for family in families:
        assert f"csrc/{family.name}" not in text
        for source in family.iterdir():
            assert source.name not in text


def test_setup_only_drives() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 60


def test_pins_and_metadata() -> None:
    """A fresh .venv gets exact versions; the package itself takes any torch from 2.11 on."""
    pins = [line for line in (ROOT / "requirements.txt").read_text().split() if "==" in line]
    assert pins == ["torch==2.13.0", "triton==3.7.1"]
    project = (ROOT / "pyproject.toml").read_text().split("[project]")[1]
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert dependencies is not None
    assert '"torch>=2.11",' in dependencies[1]
    assert "==2" not in dependencies[1]


def test_coefficients_are_the_generators(capsys: pytest.CaptureFixture[str]) -> None:
    """fit_polynomials.py prints what reference.py holds and math.h spells, highest order first."""
    runpy.run_path(str(ROOT / "csrc/common/fit_polynomials.py"), run_name="__main__")
    printed: dict[str, tuple[float, ...]] = {}
    exec(capsys.readouterr().out, printed)
    reference = gmkernels.ops.noise.reference
    for name in ("_LN", "_SIN", "_COS"):
        assert printed[name] == getattr(reference, name), name
    triton_common = pytest.importorskip("gmkernels.triton_common")
    assert printed["_TANH"] == triton_common.TANH_TAIL.value
    header = (ROOT / "csrc/common/math.h").read_text()
    for name in ("_LN", "_LOG1P", "_EXP", "_EXP2", "_SIN", "_COS", "_TANH", "_EXP2_RELATIVE"):
        for coefficient in printed[name]:
            assert f"{coefficient!r}f" in header, (name, coefficient)
