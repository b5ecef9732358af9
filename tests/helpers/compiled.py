"""Compiler output that is kept between processes and sessions, by the digest of what it was made from."""

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
    """Output of `COMPILER --version`."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def compiled(
    name: str, compiler: str, flags: Iterable[str], sources: Iterable[Path], build: Callable[[Path], None]
) -> Path:
    """Return the folder that `build` fills, from the cache if nothing that it depends on has changed.

    Args:
        name: Prefix of the folder's name; one build of a name runs at a time, also across processes.
        compiler: Whose version counts.
        flags: Which count.
        sources: Files whose contents count: sources, headers, and the script that calls the compiler.
        build: Compiles into an empty folder; what it raises leaves nothing in the cache.
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
    """The project's setup.py as a module: how its libraries are compiled."""
    spec = spec_from_file_location("megashear_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
