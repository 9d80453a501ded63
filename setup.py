"""Build the native code with CMake and Ninja; without a compiler the package still installs."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def _tool(name: str) -> str:
    """The path of a build tool: its wheel in pip's build environment, else the PATH."""
    try:
        module = __import__(name)
        path = Path(module.CMAKE_BIN_DIR if name == "cmake" else module.BIN_DIR) / name
        if path.exists():
            return str(path)
    except (ImportError, AttributeError):
        pass
    return shutil.which(name) or name


class CMakeBuild(build_ext):
    """One CMake build makes every module; what was made is copied where setuptools wants it."""

    def run(self):
        reason = self._build()
        package = Path(self.build_lib) / "medgpt_kernels"
        if self.editable_mode or self.inplace:
            package = ROOT / "medgpt_kernels"
        package.mkdir(parents=True, exist_ok=True)
        for old in (*package.glob("_c.*"), *package.glob("_cpu_*.so"), *package.glob("_cuda.so")):
            old.unlink()
        self._made = []
        for built in sorted((self._build_dir() / "out").glob("*.so")):
            shutil.copy2(built, package / built.name)
            self._made.append(str(package / built.name))
        (package / "_build_info.txt").write_text(reason + "\n")
        self._made.append(str(package / "_build_info.txt"))

    def get_outputs(self):
        return self._made

    def get_output_mapping(self):
        return {}

    def _build_dir(self) -> Path:
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        return ROOT / "build" / tag

    def _build(self) -> str:
        """Configure and build; the text says what was built, or why not."""
        build = self._build_dir()
        shutil.rmtree(build / "out", ignore_errors=True)
        build.mkdir(parents=True, exist_ok=True)
        try:
            import pybind11

            configure = [
                _tool("cmake"),
                "-S", str(ROOT),
                "-B", str(build),
                "-G", "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DMEDGPT_OUT={build / 'out'}",
                f"-DMEDGPT_EXT_SUFFIX={EXT_SUFFIX}",
                f"-DMEDGPT_CUDA={os.environ.get('MEDGPT_CUDA', '1')}",
                f"-DMEDGPT_CUDA_ARCHS={os.environ.get('MEDGPT_CUDA_ARCHS', '')}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ]  # fmt: skip
            self._call(configure, build)
            self._call([_tool("cmake"), "--build", str(build)], build)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("MEDGPT_REQUIRE_NATIVE") == "1":
                raise
            text = f"native code not built: {error}; log: {build / 'build.log'}"
            print(f"medgpt_kernels: {text}", file=sys.stderr)
            return text
        return (build / "summary.txt").read_text().strip()

    def _call(self, command: list[str], build: Path):
        """Run one step; pip moves its build environment, so a stale cache is thrown away."""
        log = build / "build.log"
        for attempt in range(2):
            with log.open("a") as stream:
                done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT)
            if done.returncode == 0:
                return
            if attempt or "--build" in command or not (build / "CMakeCache.txt").exists():
                sys.stderr.write(log.read_text()[-4000:])
                raise subprocess.CalledProcessError(done.returncode, command[0])
            (build / "CMakeCache.txt").unlink()
            shutil.rmtree(build / "CMakeFiles", ignore_errors=True)


setup(
    ext_modules=[Extension("medgpt_kernels._c", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
