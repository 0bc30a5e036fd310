"""Drives CMakeLists.txt, the one build truth. No C++ compiler: the package installs pure Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def replace(source: Path, target: Path) -> None:
    # Copies beside and renames: a process that has the old file loaded keeps it.
    beside = target.with_name(target.name + ".new")
    shutil.copy2(source, beside)
    os.replace(beside, target)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
        if not any(shutil.which(name) for name in compilers if name):
            print("gmkernels: no C++ compiler, installing without native kernels", file=sys.stderr)
            return
        import pybind11

        source = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Kept between installs, so that rebuilds are incremental.
        build = source / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        generator = ["-GNinja"] if shutil.which("ninja") else []
        options = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "GM_VERSION": self.distribution.get_version(),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", *generator, f"-S{source}", f"-B{build}", *defines], check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C", "--parallel"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace(build / target.name, target)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        # An editable install already built in place; without a compiler there is nothing to copy.
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name))
            if built.exists():
                package = self.get_finalized_command("build_py").get_package_dir("gmkernels")
                replace(built, Path(package) / built.name)


setup(ext_modules=[Extension("gmkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
