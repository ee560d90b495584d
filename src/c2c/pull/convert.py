"""From a GGUF to a folder that ``from_pretrained`` loads: once, because unpacking a GGUF is slow."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from c2c.errors import ModelLoadError
from c2c.pull.aliases import Alias
from c2c.pull.cache import SOURCE_FILE
from c2c.version import __version__


def convert(alias: Alias, gguf: Path, folder: Path) -> None:
    """Write the model as safetensors in bfloat16, with its tokenizer, to ``folder``.

    The folder is replaced as a whole; nobody sees it half written.

    Raises:
        ModelLoadError: transformers can't read the GGUF.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(f".{alias.name}-*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{alias.name}-") as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()  # not the temporary folder itself: that one only its owner may read
        with _quiet_transformers():
            model, tokenizer = _load(gguf)
            _save(model, tokenizer, fresh)
        _share(fresh)
        (fresh / SOURCE_FILE).write_text(json.dumps(_describe_source(alias), indent=2) + "\n")
        _swap(fresh, folder, Path(temporary) / "old")


def _load(gguf: Path) -> tuple[Any, Any]:
    """The model, unpacked to bfloat16, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # the reader of a GGUF raises whatever its parts raise
        raise ModelLoadError(
            f"transformers {version('transformers')} could not read {gguf.name}: {error}. "
            "Run `c2c doctor` to check the installed versions."
        ) from error


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    # The weights are unpacked, so what we save is no GGUF any more; save_pretrained refuses while these say so.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise OSError(str(error)) from error
    tokenizer.save_pretrained(folder)


def _share(folder: Path) -> None:
    """safetensors writes files that only their owner may read; a cache may be shared."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars, which would break into ours; one of them ignores its own switch."""
    logging: Any = import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _describe_source(alias: Alias) -> dict[str, Any]:
    return {
        "alias": alias.name,
        "title": alias.title,
        "wheels": [
            {"distribution": part.distribution, "version": part.version, "member": part.member} for part in alias.parts
        ],
        "gguf_sha256": alias.sha256,
        "gguf_size": alias.size,
        "dtype": "bfloat16",
        "licence": alias.licence,
        "licence_note": alias.licence_note,
        "versions": {"c2c": __version__} | {name: version(name) for name in ("transformers", "torch", "gguf")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _swap(fresh: Path, folder: Path, aside: Path) -> None:
    """Rename ``fresh`` to ``folder``; what was there goes ``aside``: renaming over a full folder fails."""
    if folder.is_dir():
        os.replace(folder, aside)
    try:
        os.replace(fresh, folder)
    except OSError:
        if (folder / SOURCE_FILE).is_file():  # another machine that shares the folder was faster: same model
            return
        if aside.is_dir():
            os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
