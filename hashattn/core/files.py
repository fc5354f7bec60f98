"""Where files are kept, and writing them so that they are there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

_LOCK, _DAY = ".in-use", 86_400.0


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` if nothing is raised, and is removed otherwise.

    The name is random, so that processes and containers may do so at once: one of them is last. Where `path` is a
    link, the file that it leads to is replaced; what is no file of a disk (/dev/stdout) is written through.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: name a file")
    if path.exists() and not path.is_file():
        with tempfile.TemporaryDirectory() as elsewhere:
            yield (scratch := Path(elsewhere, f"written{path.suffix}"))
            with scratch.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    path = Path(os.path.realpath(path))
    scratch = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(8)}{path.suffix}")
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
    token = secrets.token_hex(8)
    scratch, old = (path.with_name(f".{path.name[:40]}.{token}.{what}") for what in ("new", "old"))
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


@contextlib.contextmanager
def scratch_folder(folder: Path, prefix: str) -> Iterator[Path]:
    """A new folder within `folder`, removed afterwards; those of processes that were killed go first.

    A lock in it is let go when the process ends, however that happens.
    """
    sweep(folder, f"{prefix}*")
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as name, contextlib.ExitStack() as held:
        with contextlib.suppress(ImportError, OSError):  # no such system is tried, or none on this disk
            import fcntl

            lock = held.enter_context(Path(name, "taking").open("wb"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(lock.name, Path(name, _LOCK))  # nobody sees it before it is locked
        yield Path(name)


def sweep(folder: Path, pattern: str) -> None:
    """Remove the folders of this pattern whose lock nobody holds, or that have none and were left alone for a day."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process is at it, or it belongs to somebody else
            if path.is_dir() and not path.is_symlink() and _left(path):
                shutil.rmtree(path, ignore_errors=True)


def _left(scratch: Path) -> bool:
    try:
        import fcntl

        with (scratch / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        touched = max(path.lstat().st_mtime for path in (scratch, *scratch.rglob("*")))
        return time.time() - touched > _DAY


@contextlib.contextmanager
def locked(path: str | Path, what: str) -> Iterator[None]:
    """Hold a lock file for as long as this runs. It is let go when the process ends, however that happens.

    Args:
        path: of the lock file, in a folder that is there; it is removed afterwards.
        what: that nobody else may do meanwhile, for the message: "capturing into 'out'".

    Raises:
        ValueError: another process, of this machine or of another container, holds it: the message says who.
    """
    try:
        import fcntl
    except ImportError:  # no such system is tried
        yield
        return
    path = Path(path)
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(held)
            os.close(held)
            raise ValueError(f"{what}: {holder} is at it; wait until it has ended, or stop it") from error
        except OSError as error:
            warnings.warn(f"{str(path)!r} cannot be locked ({error}): run one process at a time", stacklevel=3)
            break
        if _is_still(held, path):
            os.ftruncate(held, 0)
            os.write(held, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
            break
        os.close(held)  # it was let go and removed in between
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(held)


def _holder(held: int) -> str:
    try:
        said = json.loads(os.pread(held, 1000, 0))
        return f"process {said['process']} on {said['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def _is_still(held: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(held), path.stat())
    except FileNotFoundError:
        return False


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def private_folder(path: Path) -> Path:
    """A folder that only this user can write to: made if it is not there, mode 0700.

    Raises:
        OSError: it cannot be made, is a link or no folder, or belongs to somebody else.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{str(path)!r} is no folder of its own, but a link or a file")
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{str(path)!r} belongs to user {found.st_uid}, not to {os.geteuid()}")
    if stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)
    return path


def kept(folder: Path, stem: str, suffix: str) -> Path | None:
    """A file that keep() has written to a private folder, if its content still has the hash that its name ends in."""
    for path in folder.glob(f"{stem}-*{suffix}"):
        found = path.lstat()
        own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
        if own and path.name == _kept_name(stem, suffix, path.read_bytes()):
            return path
        path.unlink(missing_ok=True)
    return None


def keep(folder: Path, stem: str, suffix: str, content: bytes) -> Path:
    """Write a file that is worth nothing if a bit of it changes; returns its path."""
    path = folder / _kept_name(stem, suffix, content)
    with replacing(path) as scratch:
        scratch.touch(mode=0o600)
        scratch.write_bytes(content)
    return path


def _kept_name(stem: str, suffix: str, content: bytes) -> str:
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:32]}{suffix}"


def default_cache_dir() -> Path:
    """$HASHATTN_CACHE, else hashattn/ in the user's cache folder.

    Raises:
        OSError: the user has no home folder.
    """
    try:
        if chosen := os.environ.get("HASHATTN_CACHE"):
            return Path(chosen).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "hashattn"
    except RuntimeError as error:  # what pathlib raises of it
        raise OSError("there is no home folder to keep files in: set HASHATTN_CACHE to a folder") from error
