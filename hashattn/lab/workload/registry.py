"""Downloading a published archive from where pip would: its index, mirrors, proxy and certificates; none of it is run.

pip runs an sdist's own build code before it hands the file over. Here an archive is a file of a known name and SHA-256
that is read from the index's pages (PEP 503 and 691), and nothing in it is ever run.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import http.client
import importlib
import netrc
import os
import re
import shutil
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import url2pathname

from hashattn.core.errors import Failure
from hashattn.core.files import sha256
from hashattn.core.json_files import parse_json

PYPI = "https://pypi.org/simple"
PAGE = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
LARGEST_PAGE = 32 << 20  # bytes
PATIENCE = 60.0  # seconds of silence


class DownloadError(Failure):
    """An asset could not be fetched, or what was fetched is not what was expected."""


@dataclass(frozen=True)
class Archive:
    """A file that a registry has: what it belongs to ("name==version"), its name and what is in it."""

    package: str
    filename: str
    sha256: str

    @property
    def project(self) -> str:
        """The package's name as indexes spell it."""
        return re.sub(r"[-_.]+", "-", self.package.partition("==")[0]).lower()


@dataclass(frozen=True)
class Settings:
    """What pip was told about the network, as `pip config list` shows it."""

    pages: tuple[str, ...]  # indexes, without the project's name
    places: tuple[str, ...] = ()  # folders and pages that list files, pip's find-links
    cert: str | None = None
    client_cert: str | None = None
    proxy: str | None = None
    trusted: tuple[str, ...] = ()
    timeout: float = PATIENCE

    @classmethod
    def of(cls, told: dict[str, str]) -> Settings:
        """From pip's options by name."""
        indexes = (told.get("index-url") or PYPI, *told.get("extra-index-url", "").split())
        if told.get("no-index", "0").lower() in ("1", "true", "yes", "on"):
            indexes = ()
        places, trusted = (tuple(told.get(name, "").split()) for name in ("find-links", "trusted-host"))
        timeout = max(PATIENCE, float(told.get("timeout") or told.get("default-timeout") or 0))
        cert, client_cert, proxy = (told.get(name) for name in ("cert", "client-cert", "proxy"))
        return cls(indexes, places, cert, client_cert, proxy, trusted, timeout)


def settings() -> Settings:
    """What pip is told by its files and by the environment; the environment alone where there is no pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    told: dict[str, dict[str, str]] = {"global": {}, "download": {}, "env": {}}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        place, _, value = line.partition("=")
        section, _, name = place.replace(":env:", "env").rpartition(".")
        if section in told:
            told[section][name.replace("_", "-")] = str(ast.literal_eval(value))
    for name, value in os.environ.items():
        if name.startswith("PIP_"):
            told["env"][name[4:].lower().replace("_", "-")] = value
    return Settings.of(told["global"] | told["download"] | told["env"])


def download(archive: Archive, target: Path, told: Settings | None = None) -> None:
    """Write the archive to `target`, of a folder of one's own. It is left there only if its SHA-256 is the right one.

    Raises:
        DownloadError: no place has it, or what they have is not it; every place is named with what is wrong there.
    """
    told, wrong = told or settings(), []
    for place in (*told.places, *(f"{page.rstrip('/')}/{archive.project}/" for page in told.pages)):
        shown = _shown(place)
        try:
            url = next((url for name, url in _listed(place, told) if name == archive.filename), None)
            if url is None:
                raise ValueError(f"has no {archive.filename}")
            shown = _shown(url)
            with _opened(url, told) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            if (found := sha256(target)) == archive.sha256:
                return
            raise ValueError(f"has sha256 {found}, expected {archive.sha256}")
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
            wrong.append(f"  {shown}: {error}")
            target.unlink(missing_ok=True)
    lines = wrong or ["  pip is told to use no index"]
    raise DownloadError(
        "\n".join([f"{archive.filename} of {archive.package} could not be downloaded:", *lines])
        + "\nCheck the network and pip's settings (PIP_INDEX_URL, PIP_PROXY, PIP_CERT), then try again; or put the "
        "file into a folder and name that in PIP_FIND_LINKS"
    )


def _listed(place: str, told: Settings) -> Iterator[tuple[str, str]]:
    """(file name, address) of everything that a folder or a page of an index lists."""
    folder = _local(place)
    if folder is not None and (folder / "index.html").is_file():
        folder = folder / "index.html"
    if folder is not None and not folder.is_file():
        yield from ((path.name, path.as_uri()) for path in folder.absolute().iterdir())
        return
    with _opened(place if folder is None else folder.absolute().as_uri(), told) as page:
        data, base, kind = page.read(LARGEST_PAGE + 1), page.geturl(), page.headers.get_content_type()
    if len(data) > LARGEST_PAGE:
        raise ValueError(f"its page is larger than {LARGEST_PAGE:,} bytes")
    links = _Links(base)
    if kind.endswith("+json"):
        links.found = [(str(file["filename"]), urljoin(base, str(file["url"]))) for file in _files(data)]
    else:
        links.feed(data.decode("utf-8", "replace"))
    for name, url in links.found:
        if urlsplit(base).scheme == "file" or urlsplit(url).scheme in ("http", "https"):  # no page leads to own files
            yield name, url


def _files(data: bytes) -> list[dict[str, Any]]:
    page = parse_json(data)
    files = page.get("files") if isinstance(page, dict) else None
    if not isinstance(files, list) or not all(isinstance(f, dict) and {"filename", "url"} <= set(f) for f in files):
        raise ValueError("its page is none of an index (PEP 691)")
    return files


class _Links(HTMLParser):
    """The links of a page, with the names of the files that they lead to."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base = base
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "base" and href:
            self.base = urljoin(self.base, href)
        if tag == "a" and href:
            url = urljoin(self.base, href).partition("#")[0]
            self.found.append((unquote(urlsplit(url).path.rpartition("/")[2]), url))


def _opened(url: str, told: Settings) -> Any:
    """The response to a request, with the user's proxy, certificates and password."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    request = urllib.request.Request(_bare(url), headers={"Accept": PAGE, "User-Agent": "hashattn"})
    if password := _password(parts):
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(password.encode()).decode())
    trusted = host in told.trusted or parts.netloc.rpartition("@")[2] in told.trusted
    context = ssl.create_default_context(cafile=told.cert if told.cert and Path(told.cert).is_file() else None)
    if told.cert and Path(told.cert).is_dir():
        context.load_verify_locations(capath=told.cert)
    if not told.cert:
        with contextlib.suppress(ImportError):  # some Pythons come without certificates
            context.load_verify_locations(importlib.import_module("certifi").where())
    if told.client_cert:
        context.load_cert_chain(told.client_cert)
    if trusted:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    proxy = {"http": told.proxy, "https": told.proxy} if told.proxy else None
    handlers = urllib.request.ProxyHandler(proxy), urllib.request.HTTPSHandler(context=context)
    return urllib.request.build_opener(*handlers).open(request, timeout=told.timeout)


def _password(parts: SplitResult) -> str | None:
    """user:password of an address, else of the user's .netrc."""
    if parts.username:
        return f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if found := netrc.netrc(os.environ.get("NETRC")).hosts.get(parts.hostname or ""):
            return f"{found[0]}:{found[2]}"
    return None


def _bare(url: str) -> str:
    """An address without the password in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _shown(place: str) -> str:
    return place if _local(place) is not None else _bare(place)


def _local(place: str) -> Path | None:
    """The path of a folder or page of this machine; None for those of others."""
    parts = urlsplit(place)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return None if parts.scheme in ("http", "https") else Path(place).expanduser()
