"""Drives CMakeLists.txt, the one build truth. No C++ compiler: the package installs pure Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if not any(
            map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))
        ):
            print(
                "gmkernels: no C++ compiler found, installing without native kernels",
                file=sys.stderr,
            )
            return
        import pybind11

        source = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = (
            source / "build" / f"cmake-{sys.implementation.cache_tag}"
        )  # kept: rebuilds are incremental
        build.mkdir(parents=True, exist_ok=True)
        generator = ["-GNinja"] if shutil.which("ninja") else []
        configure = [
            "cmake",
            *generator,
            f"-S{source}",
            f"-B{build}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGM_VERSION={self.distribution.get_version()}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C", "--parallel"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        # An editable install already built in place; without a compiler there is nothing to copy.
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name))
            if built.exists():
                package = self.get_finalized_command("build_py").get_package_dir("gmkernels")
                shutil.copy2(built, Path(package) / built.name)


setup(ext_modules=[Extension("gmkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
