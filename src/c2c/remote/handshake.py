"""The handshake: a server's model, as plain data without weights, code or pickle, and what it may be asked for."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from pydantic import BaseModel, Field, ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from c2c import rope
from c2c.errors import C2CError, RemoteError
from c2c.handoff import PRECISIONS, Precision
from c2c.identity import ModelIdentity
from c2c.kv_cache import KVGeometry
from c2c.sharer import Sharer
from c2c.utils import without_folder
from c2c.version import __version__

_LEFT_OUT = ("auto_map", "quantization_config", "transformers_version", "_name_or_path", "dtype", "torch_dtype")
_PROBE = torch.tensor([[1, 100, 1000]])
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_MOST_LAYERS = 4096


class Handshake(BaseModel, frozen=True):
    """Describe a server's model and limits; unknown fields of a newer version are ignored."""

    format: Literal["c2c-remote-2"] = "c2c-remote-2"  # of the wire
    version: str = __version__  # of c2c
    sharer: ModelIdentity
    config: dict[str, Any]  # of the model's text decoder
    dtype: Literal["float64", "float32", "bfloat16", "float16"]  # of its cache
    layers: list[int]  # whose entries may be sent
    precisions: list[Precision] = Field(min_length=1)  # in which they may be sent, the finest first
    fusers: list[str]  # hashes of those that the server projects with
    tokens: int  # of one request at most, padding and drafts included
    vocabulary: int  # number of token ids
    context: int | None = None  # positions of the model, None where its config does not say
    rope: list[rope.Convention | None]  # how each layer rotates its keys
    rotary: list[float] | None = None  # checksum of the rotary tables per layer, None without rotary embedding
    rotary_error: str | None = None  # why the rotation can't be taken off, None where it can
    tokenizer: dict[str, str] | None = None  # files by name, None where there is none or it was not wanted

    @classmethod
    def describe(cls, sharer: Sharer, layers: list[int], finest: str, fusers: Sequence[str], tokens: int) -> Self:
        """Describe a model and what is given of it; its name without the folder that it was loaded from."""
        facts, scheme, rotary_error = sharer.identity.to_dict(), cast(rope.Scheme, []), None
        facts["name"] = without_folder(sharer.identity.name)
        try:
            scheme = sharer.rope_scheme
        except C2CError as error:
            rotary_error = str(error)
        most = PRECISIONS[finest].itemsize
        config = json.loads(sharer.model.config.get_text_config(decoder=True).to_json_string(use_diff=False))
        return cls(
            sharer=ModelIdentity.from_dict(facts),
            config={key: value for key, value in config.items() if key not in _LEFT_OUT},
            dtype=cast(Any, str(sharer.dtype).removeprefix("torch.")),
            layers=layers,
            precisions=[cast(Precision, one) for one, dtype in PRECISIONS.items() if dtype.itemsize <= most],
            fusers=sorted(fusers),
            tokens=tokens,
            vocabulary=sharer.model.get_input_embeddings().num_embeddings,
            context=sharer.context_length,
            rope=scheme,
            rotary=_rotary_checksums(sharer.model, scheme),
            rotary_error=rotary_error,
            tokenizer=None if sharer.tokenizer is None else _tokenizer_files(sharer.tokenizer),
        )

    @classmethod
    def parse(cls, data: bytes, url: str) -> Self:
        """Read what a server sent.

        Raises:
            RemoteError: another version, or something is missing or has another form.
        """
        try:
            found = cls.model_validate_json(data)
            if not 0 < found.geometry.layers <= _MOST_LAYERS:
                raise ValueError(f"a model of {found.geometry.layers} layers")
        except (ValidationError, ValueError, TypeError) as error:
            message = f"the handshake of {url} can't be read: {error}. Is that `c2c share`, of the same version of c2c?"
            raise RemoteError(message, "malformed") from error
        return found

    @property
    def geometry(self) -> KVGeometry:
        """The shape of the model's cache."""
        return KVGeometry(**self.sharer.kv)

    def build_model(self, url: str) -> PreTrainedModel:
        """Build the model on the meta device, with a rotary embedding that works.

        Raises:
            RemoteError: a model that this version of transformers does not have, or rotates otherwise.
        """
        data = {key: value for key, value in self.config.items() if key not in _LEFT_OUT}
        try:
            config = AutoConfig.for_model(data.pop("model_type"), **data)
            with torch.device("meta"):
                options = {"trust_remote_code": False, "dtype": getattr(torch, self.dtype)}
                model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
            for name in {convention.module for convention in self.rope if convention is not None}:
                embedding = model.get_decoder().get_submodule(name)
                model.get_decoder().set_submodule(name, type(embedding)(config))
            ours = _rotary_checksums(model, self.rope)
            if (ours is None) != (self.rotary is None) or any(
                not abs(a - b) < 1e-2 for a, b in zip(ours or [], self.rotary or [], strict=True)
            ):
                raise ValueError("it rotates its keys otherwise than transformers does here")
        except Exception as error:  # whatever a foreign config makes it raise
            raise RemoteError(
                f"the model behind {url} can't be built from its config ({type(error).__name__}: {error}). Models with "
                "code of their own can't be shared from afar; for others bring both sides to the same version of "
                "transformers.",
                "config",
            ) from error
        return model

    def load_tokenizer(self, url: str) -> Any:
        """Load the tokenizer in the files that came; None where none came.

        Raises:
            RemoteError: files of other names, or no tokenizer.
        """
        if self.tokenizer is None:
            return None
        if unknown := sorted(set(self.tokenizer) - set(_FILES)):
            raise RemoteError(f"the sharer at {url} sent unexpected tokenizer files: {unknown}.", "malformed")
        with tempfile.TemporaryDirectory() as folder:
            for name, text in self.tokenizer.items():
                (Path(folder) / name).write_text(text, encoding="utf-8", newline="")
            try:
                return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            except Exception as error:  # whatever a broken file makes it raise
                message = f"the tokenizer that the sharer at {url} sent can't be loaded: {error}."
                raise RemoteError(f"{message} Pass tokenizer=... with a local one.", "tokenizer") from error


def _rotary_checksums(model: PreTrainedModel, scheme: rope.Scheme) -> list[float] | None:
    """Return a number per layer by which two sides compare their rotary tables; None without rotary embedding."""
    device = next((buffer.device for buffer in model.get_decoder().buffers() if not buffer.is_meta), "cpu")
    tables = rope.tables(model, _PROBE.to(device), scheme)
    return None if tables is None else [float(table.cos.double().sum() + table.sin.double().sum()) for table in tables]


def _tokenizer_files(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = [Path(folder) / name for name in _FILES]
        return {path.name: path.read_text(encoding="utf-8") for path in paths if path.exists()}
