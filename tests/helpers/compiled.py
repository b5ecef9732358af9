"""Cache of compiled test libraries, keyed by the digest of their inputs."""

import fcntl
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".pytest_cache" / "compiled"


@cache
def version_of(compiler: str) -> str:
    """Return the output of `COMPILER --version`."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def compiled(
    name: str, compiler: str, flags: Iterable[str], sources: Iterable[Path], build: Callable[[Path], None]
) -> Path:
    """Return the folder filled by `build`, from the cache if its inputs are unchanged.

    Args:
        name: Prefix of the folder's name. One build per name runs at a time, also across processes.
        compiler: Compiler whose version is part of the key.
        flags: Flags that are part of the key.
        sources: Files whose contents are part of the key: sources, headers, and the script that calls the compiler.
        build: Compiles into an empty folder. If it raises, nothing is cached.
    """
    digest = hashlib.sha256("\0".join([version_of(compiler), *flags]).encode())
    for path in sorted(sources):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = FOLDER / f"{name}-{digest.hexdigest()[:20]}"
    with (FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for stale in FOLDER.glob(f"{name}-*"):
                shutil.rmtree(stale)
            fresh = Path(tempfile.mkdtemp(dir=FOLDER, prefix=f".{name}-"))
            try:
                build(fresh)
                fresh.rename(folder)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return folder


@cache
def build_script() -> ModuleType:
    """Import the project's setup.py as a module."""
    spec = spec_from_file_location("megashear_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
