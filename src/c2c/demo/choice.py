"""The fusers that the demo offers, read from their configs alone so that the page need not wait for torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from c2c.demo.errors import DemoError
from c2c.hub_aliases import ALIASES, is_pulled
from c2c.utils import read_json_object

PREFIX = "The answer is"  # what a fuser trained on letters is asked to continue


@dataclass(frozen=True)
class Choice:
    """One fuser and the pair that it names.

    Attributes:
        source: its folder.
        name: the folder's name.
        family: of the fuser.
        receiver: name of the model that answers.
        sharer: name of the model that shares.
        trained: whether it was trained.
        value: its score on the dev set of its training, None where there is none.
        prefix: the answer prefix that it was trained with, if any.
        given: whether the user named it.
    """

    source: str
    name: str
    family: str
    receiver: str
    sharer: str
    trained: bool
    value: float | None
    prefix: str
    given: bool

    @property
    def private(self) -> bool:
        """Whether the sharer hands over what it alone has read."""
        return self.family == "memory"

    @property
    def here(self) -> bool:
        """Whether nothing is left to pull; names that are no alias are taken to be here."""
        return all(is_pulled(name) for name in (self.receiver, self.sharer) if name in ALIASES)

    @property
    def label(self) -> str:
        """What the page calls it."""
        remark = "" if self.trained else ", untrained: it adds nothing"
        return f"{self.name} ({self.family}{remark})"


def find_choices(given: Sequence[str]) -> list[Choice]:
    """The fusers that the user named, then those of the zoo, each once.

    Raises:
        DemoError: a folder that is no fuser of one pair, or nothing was found at all.
    """
    found: dict[Path, Choice] = {}
    for source in given:
        choice = _read(_folder(source), given=True)
        found.setdefault(Path(choice.source).resolve(), choice)
    for folder in _shipped():
        found.setdefault(folder.resolve(), _read(folder, given=False))
    if not found:
        raise DemoError(
            "no fuser to show: there is no zoo/ here, and none was given. Pass --fuser FOLDER (a folder of `c2c train`,"
            " or a hub id), or start the demo in a clone of the repository, which has one in zoo/."
        )
    return _told_apart(list(found.values()))


def default_choice(choices: Sequence[Choice], private: bool) -> Choice | None:
    """What the page starts with: the first one that the user named, else a shipped one, if possible one whose models
    are pulled, and of those the one with the best dev score."""
    fitting = [choice for choice in choices if choice.private is private]
    named = [choice for choice in fitting if choice.given]
    if named:
        return named[0]
    return max(fitting, key=lambda choice: (choice.here, choice.trained, choice.value or 0.0), default=None)


def _shipped() -> list[Path]:
    """Folders of the zoo, here or in the clone that the package is installed from."""
    places = (Path("zoo"), Path(__file__).resolve().parents[3] / "zoo")
    return [path.parent for place in places for path in sorted(place.glob("*/config.json"))]


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    from c2c.fusers.base import resolve  # a hub id; brings torch along

    return resolve(source)


def _read(folder: Path, given: bool) -> Choice:
    if not (folder / "config.json").is_file():
        several = sorted(part.parent.name for part in folder.glob("fuser_*/config.json"))
        hint = f" It holds several fusers; name one of them: {', '.join(several)}." if several else ""
        raise DemoError(f"{folder} holds no fuser: config.json is missing.{hint} Expected a folder of `c2c train`.")
    config = read_json_object(folder / "config.json", DemoError)
    kind = str(config.get("model_type", ""))
    if not kind.startswith("c2c_fuser_"):
        raise DemoError(f"{folder} is no fuser: its model_type is {kind!r}, expected 'c2c_fuser_<family>'.")
    names = {role: (config.get(role) or {}).get("name") for role in ("receiver", "sharer")}
    missing = [role for role, name in names.items() if not name]
    if missing:
        raise DemoError(f"{folder} does not say which {' and '.join(missing)} it was made for; the demo can't load it.")
    training = config.get("training") or {}
    return Choice(
        source=str(folder),
        name=folder.resolve().name,
        family=kind.removeprefix("c2c_fuser_"),
        receiver=str(names["receiver"]),
        sharer=str(names["sharer"]),
        trained=bool(config.get("training")),
        value=(training.get("dev") or {}).get("value"),
        prefix=PREFIX if _by_letter(training) else "",
        given=given,
    )


def _by_letter(training: dict[str, Any]) -> bool:
    """Whether the fuser has learned to name a letter."""
    sources = (training.get("config") or {}).get("train") or []
    return any(part.get("form") == "letter" and part.get("kind") == "multiple_choice" for part in sources)


def _told_apart(choices: list[Choice]) -> list[Choice]:
    """Two folders of one name (such as ``best``) get their parent's name as well."""
    names = [choice.name for choice in choices]
    return [
        replace(choice, name="/".join(Path(choice.source).resolve().parts[-2:]))
        if names.count(choice.name) > 1
        else choice
        for choice in choices
    ]
