"""The tree keeps its shape: sizes, names, twins, complete rows, docstrings that say enough."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import gmkernels
from gmkernels import registry
from gmkernels.spec import KINDS, Op

ROOT = Path(__file__).parent.parent
SUFFIXES = {".py", ".cpp", ".h", ".cuh", ".cu"}
FOLDERS = ("gmkernels", "csrc", "python_tests", "benchmarks")
SOURCES = sorted(
    path
    for path in (ROOT / "setup.py", *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*")))
    if path.suffix in SUFFIXES
)
PYTHON = [path for path in SOURCES if path.suffix == ".py"]
FAMILIES = sorted(p.parent.name for p in (ROOT / "gmkernels/ops").glob("*/__init__.py"))
COMMON = {"seed", "offset", "generator", "backend"}  # keywords that test_ops.py sets in every row


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_sources_are_found() -> None:
    names = {name_of(path) for path in SOURCES}
    assert {"setup.py", "csrc/module.cpp", "csrc/common/simd.h", "gmkernels/noise.py"} <= names
    assert "noise" in FAMILIES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_size(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []


def functions(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Name, lines without the docstring, and whether it is a Triton kernel, of each function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            yield node.name, lines, any(d.startswith("triton.jit") for d in decorators)


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_function_size(path: Path) -> None:
    too_long = [
        (name, lines)
        for name, lines, is_kernel in functions(path)
        if lines > (100 if is_kernel else 60)
    ]
    assert too_long == []


def test_kernels_are_recognised() -> None:
    path = ROOT / "gmkernels/ops/noise/triton_kernel.py"
    assert [name for name, _, is_kernel in functions(path) if is_kernel] == ["noise_kernel"]


def test_names() -> None:
    """No module hides a package; no two sources of a folder share a stem, which Ninja refuses."""
    assert [p for p in PYTHON if p.name in ("triton.py", "torch.py")] == []
    compiled = [p for p in SOURCES if p.suffix in (".cpp", ".cu")]
    assert len({(p.parent, p.stem) for p in compiled}) == len(compiled)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_complete(family: str) -> None:
    files = {p.name for p in (ROOT / "gmkernels/ops" / family).iterdir()}
    required = {"reference.py", "__init__.py", "native.py", "triton_kernel.py", "spec.py"}
    assert required - files == set()
    twin = {p.name for p in (ROOT / "csrc" / family).iterdir()}
    assert {f"{family}.h", f"{family}.cpp", f"{family}_cpu.cpp"} - twin == set()
    ops = [op for op in registry.rows() if op.family == family]
    assert ops, "spec.py has no row of this family"
    assert family not in {op.name for op in ops}, "a family is a noun; no op bears its name"


@pytest.mark.parametrize("family", FAMILIES)
def test_two_headlines_a_family(family: str) -> None:
    """`make bench` has one row or two of each family: it must end within minutes."""
    rows = [b for op in registry.rows() if op.family == family for b in op.benchmarks]
    assert 1 <= sum(b.headline for b in rows) <= 2


def test_every_twin_has_a_family() -> None:
    folders = {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()}
    assert folders - set(FAMILIES) == {"common"}


@pytest.mark.parametrize("op", registry.rows(), ids=lambda op: op.name)
def test_row_is_complete(op: Op) -> None:
    """A case of each kind, and a keyword case that sets each keyword of its own."""
    assert set(KINDS) - {case.kind for case in op.cases} == set()
    names = [case.name for case in op.cases]
    assert len(set(names)) == len(names), "two cases share a name"
    parameters = inspect.signature(op.function).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - COMMON
    tried = {key for case in op.cases if case.kind == "keyword" for key in case.options}
    assert keywords - tried == set()


def test_rows_are_the_public_ops() -> None:
    rows = registry.rows()
    assert len({op.name for op in rows}) == len(rows)
    for op in rows:
        assert op.name in gmkernels.__all__
        assert getattr(gmkernels, op.name) is op.function


def test_readme_table() -> None:
    """README's table of ops is what `python -m gmkernels.registry` prints."""
    text = (ROOT / "README.md").read_text()
    header = registry.table().splitlines()[0]
    found = re.search(rf"^{re.escape(header)}\n(\|.*\n)+", text, re.MULTILINE)
    assert found is not None, "README.md has no table of ops"
    assert found[0].strip() == registry.table()


def modules() -> list[ModuleType]:
    walked = pkgutil.walk_packages(gmkernels.__path__, "gmkernels.")
    names = [module.name for module in walked if not module.name.endswith(("._C", "__main__"))]
    return [gmkernels, *map(importlib.import_module, names)]


def public_functions() -> dict[str, FunctionType]:
    """The functions of gmkernels.__all__ and the public ones of each family."""
    packages = [gmkernels, *(importlib.import_module(f"gmkernels.ops.{f}") for f in FAMILIES)]
    found = {
        name: getattr(package, name)
        for package in packages
        for name in getattr(package, "__all__", ())
    }
    return {name: item for name, item in found.items() if isinstance(item, FunctionType)}


@pytest.mark.parametrize("name", public_functions())
def test_docstring(name: str) -> None:
    docstring = inspect.getdoc(public_functions()[name]) or ""
    assert "Returns" in docstring
    assert ">>>" in docstring, "no doctest"


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__)
def test_doctests(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.failed == 0
