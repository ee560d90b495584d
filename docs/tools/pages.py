"""Hooks of the documentation site (``make docs``).

Pages of ``docs/`` link to files elsewhere in the repository (``../configs/laptop.yaml``, ``../CONTRIBUTING.md``), as a
code host wants it. Here such files become part of the site, and links are changed to where they lie in it. The table
of modules in ``api.md`` becomes one page for each module. A page that would fetch anything from another host stops
the build.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs"
API = "api.md"
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_MODULE = re.compile(r"^\| `(c2c[\w.]*)` \|", re.MULTILINE)


def links(markdown: str) -> list[str]:
    """Targets of the links of a page that lead into the repository, code blocks left out."""
    found = [match[2] for match in _LINK.finditer(_FENCE.sub("", markdown))]
    return [target for target in found if not re.match(r"[a-z]+:|#", target)]


def place(path: str) -> str:
    """Where a file of the repository lies in the site: what is below ``docs/`` at the top, the rest as it is."""
    return path.removeprefix(f"{DOCS}/")


def origin(place_: str) -> str:
    """The file of the repository that lies at this place of the site."""
    return f"{DOCS}/{place_}" if (ROOT / DOCS / place_).exists() else place_


def rewrite(markdown: str, page: str) -> str:
    """The links of a page (a path in the repository), as they are in the site."""

    def change(match: re.Match[str]) -> str:
        target, hash_, anchor = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        there = posixpath.relpath(place(file), posixpath.dirname(place(page)) or ".")
        return f"{match[1]}{there}{hash_}{anchor}{match[3]}"

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):  # code stays as it is
        parts += [_LINK.sub(change, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(change, markdown[end:])])


def outside() -> list[str]:
    """Files outside ``docs/`` that its pages link to, and those that these link to."""
    waiting = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / DOCS).glob("*.md"))]
    found: list[str] = []
    while waiting:
        page = waiting.pop()
        for target in links((ROOT / page).read_text(encoding="utf-8")):
            file = posixpath.normpath(posixpath.join(posixpath.dirname(page), target.partition("#")[0]))
            if file.startswith(f"{DOCS}/") or file in found or not (ROOT / file).is_file():
                continue
            found.append(file)
            if file.endswith(".md"):
                waiting.append(file)
    return sorted(found)


def modules() -> list[str]:
    """The public modules: the first column of the table in ``api.md``."""
    return _MODULE.findall((ROOT / DOCS / API).read_text(encoding="utf-8"))


def fetched(html: str) -> list[str]:
    """What a browser would fetch from other hosts to show this page."""
    reader = _Reader()
    reader.feed(html)
    return reader.found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what a tag loads, links that a reader may follow left out."""
        for name, value in attrs:
            loads = name in ("src", "srcset", "data", "poster") or (tag == "link" and name == "href")
            if loads and re.match(r"(https?:)?//", value or ""):
                self.found.append(f"<{tag} {name}={value}>")


# -- what mkdocs calls -------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """A page for each module, below ``api.md``; pages from outside of ``docs/`` at the end."""
    config.nav = [_with_modules(entry) for entry in config.nav]
    pages = [file for file in outside() if file.endswith(".md")]
    config.nav[-1]["Project"] += [{_title(file): file} for file in pages]
    return config


def _with_modules(entry: Any) -> Any:
    if entry == API:
        return {"API": [API, *({name: f"api/{name}.md"} for name in modules())]}
    if isinstance(entry, dict):
        return {title: [_with_modules(part) for part in parts] for title, parts in entry.items()}
    return entry


def _title(file: str) -> str:
    first = next(line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return first.removeprefix("# ")


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside ``docs/``, and the pages of modules."""
    from mkdocs.structure.files import File

    for file in outside():
        files.append(File.generated(config, file, abs_src_path=str(ROOT / file)))
    for name in modules():
        text = f"# {name}\n\n::: {name}\n"
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are in the site."""
    where = page.file.src_uri
    if where == API:
        return re.sub(_MODULE, r"| [`\1`](api/\1.md) |", markdown)
    return rewrite(markdown, origin(where))


def on_post_build(config: Any) -> None:
    """Refuse a site that needs other hosts.

    Raises:
        PluginError: naming pages and what they would fetch.
    """
    from mkdocs.exceptions import PluginError

    if wrong := list(_foreign(Path(config.site_dir))):
        raise PluginError("these pages fetch from other hosts:\n" + "\n".join(wrong))


def _foreign(site: Path) -> Iterator[str]:
    for path in sorted(site.rglob("*.html")):
        for what in fetched(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)}: {what}"
    for path in sorted(site.rglob("*.css")):
        for what in re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\"')]+", path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)}: {what}"
