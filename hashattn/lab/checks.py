"""Checks of files, folders and devices that the commands make before any work is done."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from hashattn.core.errors import UserError, reason, refusals
from hashattn.core.extras import require

STDOUT = "-"
PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")


def device_of(text: str | None) -> torch.device:
    """The device of this name that is there; the first GPU that torch sees, or the CPU, for None.

    Raises:
        UserError: it is no device, or not there.
    """
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = named_device(text)
    if device.type == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            raise UserError(
                f"--device {text}: torch {torch.__version__} is built without CUDA; install a CUDA build of torch, or "
                "take --device cpu"
            )
        if not torch.cuda.is_available():
            raise UserError(
                f"--device {text}: torch {torch.__version__} sees no GPU; run it where nvidia-smi lists one, or take "
                "--device cpu"
            )
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise UserError(f"--device {text}: there are only {count} GPUs here, cuda:0 to cuda:{count - 1}")
        return device
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # each backend has its own way to say so
        raise UserError(f"--device {text}: torch {torch.__version__} cannot compute there; take cpu or cuda") from error
    return device


def named_device(text: str) -> torch.device:
    """The device of this name, there or not.

    Raises:
        UserError: it is no device.
    """
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise UserError(f"--device {text}: there is no such device; take cpu, cuda or cuda:N (N from 0)") from error


def check_file(option: str, path: str | None, endings: tuple[str, ...] = (), *, stdout: bool = False) -> None:
    """Raise UserError unless a file can be written there at the end.

    Args:
        option: without dashes.
        path: None for none.
        endings: known ones; () for any.
        stdout: whether "-" stands for standard output.
    """
    if path is None or (stdout and path == STDOUT):
        return
    where, target = f"--{option} {path}", Path(path).absolute()
    if not path or path == STDOUT:
        raise UserError(f"--{option} must name a file, got {path!r}")
    with refusals(OSError):
        if target.is_dir():
            raise UserError(f"{where} is a folder: name a file in it")
        if target.exists() and not target.is_file():
            also = ", or - for standard output" if stdout else ""
            raise UserError(f"{where} is no regular file: name a file{also}")
        if not target.parent.is_dir():
            raise UserError(f"{where}: there is no folder {target.parent}: make it first")
    if endings and target.suffix.lower() not in endings:
        raise UserError(f"{where}: its ending says the format, and must be one of {', '.join(endings)}")
    _check_writable(where, target.parent, f".{target.stem}.", target.suffix)


def check_picture(option: str, path: str | None) -> None:
    """Likewise for a picture; also raises if what draws it is missing."""
    if path is not None:
        check_file(option, path, PICTURES)
        require("matplotlib.figure", "demo", f"--{option}")


def check_folder(option: str, path: str | None, *, parents: bool = True) -> None:
    """Raise UserError unless a folder is there to be written to, or can be made.

    Args:
        parents: whether those that lead to it may be missing as well.
    """
    if path is None:
        return
    where, target = f"--{option} {path}", Path(path).absolute()
    if not path:
        raise UserError(f"--{option} must name a folder, got {path!r}")
    with refusals(OSError):
        if target.exists() and not target.is_dir():
            raise UserError(f"{where} is a file: name a folder")
        if not parents and not target.parent.is_dir():
            raise UserError(f"{where}: there is no folder {target.parent}: make it first")
        there = next(folder for folder in (target, *target.parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"{where}: {there} is a file, so that there can be no folder in it")
    _check_writable(where, there, ".hashattn.", "")


def _check_writable(where: str, folder: Path, prefix: str, suffix: str) -> None:
    try:
        with tempfile.NamedTemporaryFile(prefix=prefix, suffix=suffix, dir=folder):
            pass
    except OSError as error:
        why = error.strerror or reason(error)
        raise UserError(f"{where}: {folder} cannot be written to: {why}; name another place") from error
