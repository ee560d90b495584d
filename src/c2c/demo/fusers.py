"""The fusers that the demo offers, read from their configs alone so that the page need not wait for torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from c2c.errors import FuserError
from c2c.hub_aliases import ALIASES, is_pulled
from c2c.utils import read_json_object
from c2c.zoo import fuser_folders


@dataclass(frozen=True)
class FuserChoice:
    """One fuser and the pair of models that it names.

    Attributes:
        source: its folder; for a copy, which has none, the model's name.
        name: the folder's name.
        score: on the dev set of its training; None where there is none.
        answer_prefix: that it was trained with, if any.
        given: whether the user named it.
    """

    source: str
    name: str
    family: str
    receiver: str
    sharer: str
    trained: bool
    score: float | None
    answer_prefix: str
    given: bool

    @property
    def private(self) -> bool:
        """Whether the sharer hands over what it alone has read."""
        return self.family in ("memory", "copy")

    @property
    def pulled(self) -> bool:
        """Whether both models are on this machine; names that are no alias are taken to be."""
        return all(is_pulled(name) for name in (self.receiver, self.sharer) if name in ALIASES)

    @property
    def model_names(self) -> tuple[str, str]:
        """Names of receiver and sharer without their folders."""
        return Path(self.receiver).name, Path(self.sharer).name

    @property
    def pair(self) -> str:
        """The models and what they do."""
        receiver, sharer = self.model_names
        return (
            f"{receiver} (on both sides)" if self.family == "copy" else f"{receiver} (receiver) and {sharer} (sharer)"
        )

    @property
    def label(self) -> str:
        """The text of its entry in the page's list."""
        return f"{self.name} ({self.family}{'' if self.trained else ', untrained: it adds nothing'})"


def find_fusers(given: Sequence[str], models: Sequence[str] = ()) -> list[FuserChoice]:
    """Return the fusers that the user named, then those of the zoo, each once, then copies between two equal models.

    Args:
        given: folders or hub ids.
        models: what copies are offered for, besides pulled models.

    Raises:
        FuserError: there is none, or a folder is none.
    """
    shipped = fuser_folders()
    named, found = [_folder(source) for source in given], dict[Path, FuserChoice]()
    for folder in [*named, *shipped]:
        if folder.resolve() not in found:
            found[folder.resolve()] = read_choice(folder, given=folder in named)
    if not found and not models:
        raise FuserError(
            "no fuser to show: there is no zoo/ here, and none was given. Pass --fuser FOLDER (a folder of `c2c train`,"
            " or a hub id) or --model NAME (on both sides, without a fuser), or start the demo in a clone of the "
            "repository, which has fusers in zoo/."
        )
    counts = Counter(choice.name for choice in found.values())
    fusers = [  # with the parent's name where several folders have one name, such as "best"
        replace(choice, name="/".join(folder.parts[-2:])) if counts[choice.name] > 1 else choice
        for folder, choice in found.items()
    ]
    pulled = [name for name in ALIASES if is_pulled(name)]
    return [*fusers, *(_copy(name, name in models) for name in dict.fromkeys([*models, *pulled]))]


def _copy(model: str, given: bool) -> FuserChoice:
    return FuserChoice(model, Path(model).name, "copy", model, model, True, None, "", given)


def default_fuser(choices: Sequence[FuserChoice], private: bool) -> FuserChoice | None:
    """Choose the first fuser that the user named, else that with the best dev score, of pulled models if possible."""
    fitting = [choice for choice in choices if choice.private is private]
    best = max(fitting, key=lambda choice: (choice.pulled, choice.trained, choice.score or 0.0), default=None)
    return next((choice for choice in fitting if choice.given), best)


def read_choice(folder: Path, given: bool = False) -> FuserChoice:
    """Read a fuser's folder without its weights; raise FuserError for one that names no pair of models."""
    if not (folder / "config.json").is_file():
        several = sorted(part.parent.name for part in folder.glob("fuser_*/config.json"))
        hint = f" It holds several fusers; name one of them: {', '.join(several)}." if several else ""
        raise FuserError(f"{folder} holds no fuser: config.json is missing.{hint} Expected a folder of `c2c train`.")
    config = read_json_object(folder / "config.json", FuserError)
    kind = str(config.get("model_type", ""))
    if not kind.startswith("c2c_fuser_"):
        raise FuserError(f"{folder} is no fuser: its model_type is {kind!r}, expected 'c2c_fuser_<family>'.")
    names = {role: (config.get(role) or {}).get("name") for role in ("receiver", "sharer")}
    if missing := [role for role, name in names.items() if not name]:
        raise FuserError(f"{folder} does not say which {' and '.join(missing)} it was made for; it can't be loaded.")
    training = config.get("training") or {}
    rows = (training.get("config") or {}).get("train") or []
    letters = any(part.get("form") == "letter" and part.get("kind") == "multiple_choice" for part in rows)
    return FuserChoice(
        source=str(folder),
        name=folder.resolve().name,
        family=kind.removeprefix("c2c_fuser_"),
        receiver=str(names["receiver"]),
        sharer=str(names["sharer"]),
        trained=bool(config.get("training")),
        score=(training.get("dev") or {}).get("value"),
        answer_prefix="The answer is" if letters else "",
        given=given,
    )


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    from c2c.fusers.base import resolve  # a hub id; imports torch

    return resolve(source)
