"""Where files are kept, and writing them so that they are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` if nothing is raised, and is removed otherwise."""
    path = Path(path)
    scratch = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A new folder beside `path` to fill; it becomes `path` if nothing is raised, and is removed otherwise.

    What was there goes as a whole, once the new folder is complete. Processes may do so at once: one of them is last.
    """
    path = Path(path)
    scratch, old = (path.with_name(f".{path.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    for left in (scratch, old):  # by a killed process that had this number
        shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, old)
            try:
                os.replace(scratch, path)
                break
            except OSError:
                if not path.exists():
                    raise
                shutil.rmtree(old, ignore_errors=True)  # another process was there in between
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def default_cache_dir() -> Path:
    """$HASHATTN_CACHE, else hashattn/ in the user's cache folder."""
    if chosen := os.environ.get("HASHATTN_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hashattn"
