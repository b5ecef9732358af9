"""Build the kernels of csrc/ for the CPU (megashear._csrc) and, with nvcc, for CUDA (megashear._csrc_cuda).

Neither library needs torch. A library that cannot be built is skipped and megashear uses plain torch instead, as the
build and `megashear env` report. Objects and compiler logs are cached in build/kernels by the digest of source,
headers, flags and compiler. Environment:
    MEGASHEAR_CPU        auto (default: build if a C++ compiler exists), 0 (never), 1 (fail if it cannot be built)
    MEGASHEAR_CUDA       the same for CUDA and nvcc; building needs no GPU
    MEGASHEAR_CUDA_ARCH  compute capabilities, default "80;90a"; PTX of the first supports later devices
    CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, NVCC_APPEND_FLAGS  as usual
All other package metadata is in pyproject.toml.
"""

import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "kernels"
"""Cache of object files, each with the compiler's output in `log.txt` and, for CUDA, its PTX."""
SECONDS_KEPT = 24 * 3600
"""Seconds that an object is kept after its last use."""
VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "CPATH", "CPLUS_INCLUDE_PATH")
"""Environment variables that compilers read."""
CUDA_ARCHITECTURES = "80;90a"
CPU, CUDA = "megashear._csrc", "megashear._csrc_cuda"
SWITCHES = {CPU: "MEGASHEAR_CPU", CUDA: "MEGASHEAR_CUDA"}
PATTERNS = {CPU: "cpu.cpp", CUDA: "cuda.cu"}


class CannotBuild(Exception):
    """A library is skipped; the message is the reason."""


def sources(library: str) -> list[Path]:
    """Return the binding file and the kernel sources of a library."""
    pattern = PATTERNS[library]
    found = [*ROOT.glob(f"csrc/device_{pattern}"), *ROOT.glob(f"csrc/*/{pattern}")]
    return [ROOT / "csrc/bindings.cpp", *sorted(found)]


def headers() -> list[str]:
    """Return include flags of Python and pybind11; raise CannotBuild if pybind11 is not installed."""
    try:
        import pybind11
    except ImportError as error:
        raise CannotBuild("pybind11 is not installed") from error
    return ["-isystem", sysconfig.get_paths()["include"], "-isystem", pybind11.get_include()]


def cpu_commands() -> tuple[list[str], list[str]]:
    """Return the compile and link commands of the CPU kernels; raise CannotBuild if no C++ compiler is found."""
    named = shlex.split(os.environ.get("CXX", ""))
    configured = shlex.split(sysconfig.get_config_var("CXX") or "")[:1]
    candidates = [named] if named else [configured, ["c++"], ["g++"], ["clang++"]]
    compiler = next((words for words in candidates if words and shutil.which(words[0])), None)
    if compiler is None:
        raise CannotBuild("no C++ compiler was found (set CXX or install g++)")
    flags = ["-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wconversion"]
    flags += ["-fno-trapping-math", "-fno-math-errno"]  # vectorises loops with selections; results are unchanged
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    return [*compiler, *flags], [*compiler, *flags, "-shared"]


def find_nvcc() -> str:
    """Return the path of nvcc; raise CannotBuild if it is not found."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [*(str(Path(home) / "bin" / "nvcc") for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((path for path in map(shutil.which, candidates) if path), None)
    if nvcc is None:
        raise CannotBuild("nvcc was not found (set CUDA_HOME)")
    return nvcc


def cuda_architecture_flags() -> list[str]:
    """Return nvcc's flags for MEGASHEAR_CUDA_ARCH: code for each capability and PTX of the first."""
    names = os.environ.get("MEGASHEAR_CUDA_ARCH", CUDA_ARCHITECTURES).replace(",", ";").replace(".", "").split(";")
    names = [name.strip() for name in names if name.strip()]
    if not names or not all(name.rstrip("af").isdigit() for name in names):
        raise CompileError("megashear: MEGASHEAR_CUDA_ARCH must list compute capabilities, like 80;90a")
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*flags, f"-gencode=arch=compute_{names[0]},code=compute_{names[0]}"]


def cuda_commands() -> tuple[list[str], list[str]]:
    """Return the compile and link commands of the CUDA kernels; raise CannotBuild without nvcc."""
    flags = ["-std=c++17", "-O3", "--threads=0", "-DMEGASHEAR_CUDA", "-Xptxas=-v"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", *cuda_architecture_flags()]
    return [find_nvcc(), *flags], [find_nvcc(), "-shared", "-cudart=static"]


COMMANDS = {CPU: cpu_commands, CUDA: cuda_commands}


def compile_source(library: str, command: list[str], source: Path) -> Path:
    """Compile a source unless it is cached, and return the folder of its `object.o` and `log.txt`."""
    name = "-".join(source.relative_to(ROOT / "csrc").with_suffix("").parts)
    includes = headers() if source.name == "bindings.cpp" else []  # kernels include no Python headers
    place = OBJECTS / library.rpartition(".")[2] / f"{name}-{digest(command, source)}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            os.utime(place)
            return place
        fresh = place.with_name(f".{place.name}")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        kept = ["--keep", f"--keep-dir={fresh}"] if source.suffix == ".cu" else []
        whole = [*command, *includes, *kept, "-c", str(source), "-o", str(fresh / "object.o")]
        print("megashear:", shlex.join(whole), flush=True)
        done = subprocess.run(whole, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            shutil.rmtree(fresh)
            print(done.stdout, end="", flush=True)
            raise CannotBuild(f"{command[0]} ended with status {done.returncode}, see above")
        for path in fresh.iterdir():
            if path.suffix not in (".ptx", ".o") or path.name.endswith("dlink.o"):
                path.unlink()
        (fresh / "log.txt").write_text(done.stdout)
        fresh.rename(place)
        for other in place.parent.glob(f"{name}-*"):
            if time.time() - other.stat().st_mtime > SECONDS_KEPT:
                shutil.rmtree(other)
    return place


def digest(command: list[str], source: Path) -> str:
    """Return the digest of everything an object depends on: command, environment, compilers, source and headers."""
    parts = [shlex.join(command), *(os.environ.get(name, "") for name in VARIABLES), version(command[0])]
    if source.suffix == ".cu":
        parts.append(version("g++"))  # nvcc's host compiler
    if source.name == "bindings.cpp":
        import pybind11

        parts += [sys.version, pybind11.__version__]
    if "native" in parts[0]:
        parts += [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1]
    found = hashlib.sha256("\0".join(parts).encode())
    for path in [source, *sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cuh"))]:
        found.update(path.read_bytes())
    return found.hexdigest()[:20]


@functools.cache
def version(compiler: str) -> str:
    """Return a compiler's path and its printed version."""
    path = shutil.which(compiler)
    if path is None:
        return ""
    done = subprocess.run([path, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return f"{path} {done.stdout}"


def compile_library(library: str) -> list[Path]:
    """Compile the sources of a library in parallel and return the folder of each object."""
    command, _ = COMMANDS[library]()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compile_source(library, command, source), sources(library)))


class BuildKernels(build_ext):
    """Build each library, or skip it and print the reason."""

    extensions: list[Extension]

    def build_extensions(self) -> None:
        """Build the libraries that the environment enables and remove the others from the extensions."""
        self.skipped: list[Extension] = []
        for extension in list(self.extensions):
            try:
                self._build(extension)
            except CannotBuild as reason:
                self._skip(extension, reason)
        self.extensions = [extension for extension in self.extensions if extension not in self.skipped]

    def _build(self, extension: Extension) -> None:
        switch = SWITCHES[extension.name]
        if os.environ.get(switch, "auto") == "0":
            raise CannotBuild(f"{switch}=0")
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [str(place / "object.o") for place in compile_library(extension.name)]
        fresh = target.with_name(f"{target.name}.new")
        command = [*COMMANDS[extension.name]()[1], *objects, "-o", str(fresh)]
        if extension.name == CPU:  # linkers take flags of libraries after the objects
            command += shlex.split(os.environ.get("LDFLAGS", ""))
        print("megashear:", shlex.join(command), flush=True)
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode != 0:
            fresh.unlink(missing_ok=True)
            raise CannotBuild(f"{command[0]} ended with status {done.returncode}, see above")
        fresh.replace(target)
        print(f"megashear: built {extension.name} with {command[0]}", flush=True)

    def _skip(self, extension: Extension, reason: CannotBuild) -> None:
        switch = SWITCHES[extension.name]
        if os.environ.get(switch) == "1":
            raise CompileError(f"megashear: {extension.name} is required by {switch}=1, but {reason}") from reason
        print(f"megashear: {extension.name} is skipped, using plain torch instead: {reason}", flush=True)
        Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        self.skipped.append(extension)

    def copy_extensions_to_source(self) -> None:
        """Copy the libraries beside the sources (editable installs) atomically: other processes may be loading them."""
        folder = ROOT / self.get_finalized_command("build_py").get_package_dir("megashear")
        for extension in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(extension.name))
            fresh = folder / f"{built.name}.new"
            shutil.copy2(built, fresh)
            fresh.replace(folder / built.name)
        for extension in self.skipped:
            (folder / Path(self.get_ext_filename(extension.name)).name).unlink(missing_ok=True)


def check_switches() -> None:
    """Exit with a message if a switch of the environment has an unknown value."""
    for switch in SWITCHES.values():
        if os.environ.get(switch, "auto") not in ("auto", "0", "1"):
            raise SystemExit(f"megashear: {switch} must be auto, 0 or 1, not {os.environ[switch]!r}")


if __name__ == "__main__":
    check_switches()
    setup(
        ext_modules=[Extension(name, [str(path.relative_to(ROOT)) for path in sources(name)]) for name in (CPU, CUDA)],
        cmdclass={"build_ext": BuildKernels},
    )
