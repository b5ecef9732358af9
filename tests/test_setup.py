"""The build, by the real setup.py in folders of its own: what it makes, leaves out with a word, and refuses."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CXX = ("c++", "g++", "clang++")
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(sys.argv[1], sys.argv[2])
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
assert "torch" not in sys.modules and library.strip_count(17) == 2
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a build needs: its objects do not displace those of the installation."""
    tree = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for name in ("csrc", "megashear"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tree


@pytest.fixture
def build(checkout, tmp_path):
    """`build(folder, **environment)`: build the libraries into a folder; the process, and the files that are there."""

    def run(folder: Path = tmp_path, **environment: str) -> tuple[subprocess.CompletedProcess, list[Path]]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MEGASHEAR_")}
        command = [sys.executable, "setup.py", "build_ext", f"--build-lib={folder}", f"--build-temp={folder}/temp"]
        done = subprocess.run(command, cwd=checkout, env=inherited | environment, capture_output=True, text=True)
        return done, sorted(path for path in folder.rglob("*") if path.is_file())

    return run


def installed(name: str, tools: tuple[str, ...]) -> Path:
    """The library that the installation of this checkout built; skips where it lacked the tools."""
    path = ROOT / "megashear" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not any(map(shutil.which, tools)):
        pytest.skip(f"none of {tools} is here to build it")
    assert path.is_file(), "not built: run `bash tools/install.sh`, which prints the reason"
    return path


@pytest.mark.parametrize(("name", "tools"), [("_csrc", CXX), ("_csrc_cuda", ("nvcc",))])
def test_library_needs_neither_torch_nor_gpu(name, tools):
    subprocess.run([sys.executable, "-c", LOAD, name, installed(name, tools)], check=True)


def test_cuda_architectures_are_those_of_the_environment(build, tmp_path):
    """By a stand-in for nvcc."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho compiled > "$2"\n')
    nvcc.chmod(0o755)
    environment = {"CUDA_HOME": str(nvcc.parents[1]), "MEGASHEAR_CPU": "0", "MEGASHEAR_CUDA": "1"}
    done, _ = build(tmp_path / "out", **environment, MEGASHEAR_CUDA_ARCH="9.0;8.6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "megashear._csrc is skipped" in done.stdout and "MEGASHEAR_CPU=0" in done.stdout
    line = next(line for line in done.stdout.splitlines() if " -c " in line)
    assert [word.removeprefix("-gencode=arch=") for word in line.split() if "arch=" in word] == [
        "compute_90,code=sm_90",
        "compute_86,code=sm_86",
        "compute_90,code=compute_90",
    ]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, CXX)), reason="no C++ compiler is here")
def test_cpu_library_is_built_and_needs_no_torch(build):
    done, files = build(MEGASHEAR_CPU="1", MEGASHEAR_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "megashear: built megashear._csrc with" in done.stdout
    assert "megashear._csrc_cuda is skipped" in done.stdout and "MEGASHEAR_CUDA=0" in done.stdout
    (library,) = files
    subprocess.run([sys.executable, "-c", LOAD, "_csrc", library], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
def test_cuda_library_loads_without_a_gpu(build):
    done, files = build(MEGASHEAR_CPU="0", MEGASHEAR_CUDA="1", MEGASHEAR_CUDA_ARCH="9.0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "code=sm_90" in done.stdout and "sm_80" not in done.stdout
    (library,) = files
    subprocess.run([sys.executable, "-c", LOAD, "_csrc_cuda", library], check=True)


def test_inplace_libraries_are_replaced_atomically(checkout, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho compiled > "$2"\n')
    compiler.chmod(0o755)
    tree = Path(shutil.copytree(checkout, tmp_path / "tree"))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    cpu, cuda = (tree / "megashear" / f"{name}{suffix}" for name in ("_csrc", "_csrc_cuda"))
    cpu.write_text("in use")
    cuda.write_text("of an earlier build")
    environment = os.environ | {"CXX": str(compiler), "MEGASHEAR_CPU": "1", "MEGASHEAR_CUDA": "0"}
    with cpu.open() as used:  # as a process that has loaded it
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
        assert used.read() == "in use"
    assert cpu.read_text() == "compiled\n" and not cuda.exists()
    assert [path.name for path in cpu.parent.glob("_csrc*")] == [cpu.name]


def test_only_changed_sources_are_compiled_again(checkout, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho compiled > "$2"\n')
    compiler.chmod(0o755)
    tree = Path(shutil.copytree(checkout, tmp_path / "tree", ignore=shutil.ignore_patterns("build")))
    environment = os.environ | {"CXX": str(compiler), "MEGASHEAR_CPU": "1", "MEGASHEAR_CUDA": "0"}

    def compiled() -> list[str]:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
        return [line for line in done.stdout.splitlines() if " -c " in line]

    sources = len(list(tree.glob("csrc/*/cpu.cpp"))) + 2  # and the device's, and the bindings
    assert len(compiled()) == sources
    assert compiled() == []
    with (tree / "csrc/rope/cpu.cpp").open("a") as file:
        file.write("// changed\n")
    (again,) = compiled()
    assert "csrc/rope/cpu.cpp" in again
    with (tree / "csrc/address.h").open("a") as file:
        file.write("// changed\n")
    assert len(compiled()) == sources


def test_build_without_compilers_skips_libraries(build):
    done, files = build(CXX="no-such-compiler", MEGASHEAR_CUDA="0")
    assert done.returncode == 0 and not files
    assert "no C++ compiler was found" in done.stdout and "using plain torch instead" in done.stdout


def test_a_failing_compiler_leaves_no_file(build):
    done, files = build(CXX="false", MEGASHEAR_CUDA="0")
    assert done.returncode == 0 and not files
    assert "megashear._csrc is skipped" in done.stdout and "status 1" in done.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler", "MEGASHEAR_CPU": "1"}, "MEGASHEAR_CPU=1, but no C++ compiler was found"),
        ({"CXX": "false", "MEGASHEAR_CPU": "1"}, "MEGASHEAR_CPU=1, but false ended with status 1"),
        ({"MEGASHEAR_CUDA": "yes"}, "MEGASHEAR_CUDA must be auto, 0 or 1, not 'yes'"),
        ({"MEGASHEAR_CPU": "0", "MEGASHEAR_CUDA_ARCH": "hopper"}, "MEGASHEAR_CUDA_ARCH must list"),
    ],
)
def test_impossible_build_fails_with_one_message(environment, message, build):
    done, files = build(**environment)
    assert done.returncode != 0 and not files
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_source_distribution_holds_every_kernel_source(tmp_path):
    folders = ["egg_info", f"--egg-base={tmp_path}", "sdist", f"--dist-dir={tmp_path}"]
    subprocess.run([sys.executable, "setup.py", "-q", *folders], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert wanted | {"setup.py", "pyproject.toml"} <= packed
