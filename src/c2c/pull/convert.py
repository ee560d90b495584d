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
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{alias.name}-") as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()  # not the temporary folder itself: that one only its owner may read
        try:
            with _quiet_transformers():
                _save_model(gguf, fresh)
                _save_tokenizer(gguf, fresh)
        except (ValueError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
            raise ModelLoadError(
                f"transformers {version('transformers')} could not convert {gguf.name}: {error}. "
                "Run `c2c doctor` to check the installed versions."
            ) from error
        _share(fresh)
        (fresh / SOURCE_FILE).write_text(json.dumps(_describe_source(alias), indent=2) + "\n")
        _swap(fresh, folder, Path(temporary) / "old")


def _save_model(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # The weights are unpacked, so what we save is no GGUF any more; save_pretrained refuses while these say so.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


def _save_tokenizer(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _share(folder: Path) -> None:
    """safetensors writes files that only their owner may read; a cache may be shared."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars, which would break into ours; one of them ignores its own switch."""
    from transformers.utils import logging

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
