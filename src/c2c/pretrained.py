"""Construction and storage of a C2CModel: from models, stored fusers, or published checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from c2c.adapters import with_adapter
from c2c.alignment import Aligner, CharSpanAligner, make_aligner
from c2c.errors import FuserError, ModelLoadError, PromptError
from c2c.fusers import Fuser, family
from c2c.fusers.base import load_fuser, resolve, without_file
from c2c.fusion import FusionMode
from c2c.identity import ModelIdentity
from c2c.language_model import LanguageModel, Receiver
from c2c.layer_map import layer_map as make_layer_map
from c2c.loading import base_name, locate, parse_dtype
from c2c.published import import_published, published_names, read_names
from c2c.sharer import Sharer
from c2c.utils import read_json_object, save_atomically, write_json

_MANIFEST = "c2c.json"
_URL = ("http://", "https://")


class Pretrained:
    """Construct a :class:`~c2c.model.C2CModel`, and save it."""

    fusers: nn.ModuleList
    aligner: Aligner
    mode: FusionMode

    if TYPE_CHECKING:

        def __init__(
            self, receiver: Receiver, sharers: Sequence[Sharer], fusers: Sequence[Fuser], **options: Any
        ) -> None: ...

    @classmethod
    def from_models(
        cls,
        receiver: Any,
        sharer: Any,
        *,
        fuser: str = "bottleneck",
        layer_map: str | Sequence[int | None] = "depth",
        aligner: Aligner | None = None,
        mode: FusionMode = "sequential",
        fuser_options: dict[str, Any] | None = None,
        **load_kwargs: Any,
    ) -> Self:
        """Make a new pair with an untrained fuser.

        Args:
            receiver: alias, hub id, folder, GGUF file, loaded model, or :class:`Receiver`.
            sharer: the same, the URL of ``c2c share`` or a :class:`~c2c.remote.RemoteSharer`; a list for several.
            fuser: fuser family.
            layer_map: ``depth``, ``terminal``, or one sharer layer (or None) per receiver layer.
            aligner: by default :class:`~c2c.alignment.CharSpanAligner`.
            mode: how several sharers are combined.
            fuser_options: passed to the family's config, for instance ``{"rank": 64}``.
            **load_kwargs: ``dtype``, ``sharer_dtype`` (by default the same), ``device_map`` and others, see
                :func:`c2c.loading.load`.
        """
        ours, theirs = load_models(receiver, sharer, load_kwargs, once=family(fuser).keeps_tokens)
        aligner = aligner or CharSpanAligner()
        fusers = []
        for model in theirs:
            layers = make_layer_map(layer_map, ours.geometry.layers, model.geometry.layers)
            new = family(fuser).from_geometry(model.geometry, ours.geometry, layers, **(fuser_options or {}))
            new.config.alignment = aligner.to_dict()
            fusers.append(made_for(new, ours, model))
        return cls(ours, theirs, fusers, aligner=aligner, mode=mode)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Sequence[str | Path],
        *,
        receiver: Any = None,
        sharer: Any = None,
        mode: FusionMode | None = None,
        aligner: Aligner | None = None,
        allow_mismatch: bool = False,
        fuser_dtype: Any = torch.float32,
        **load_kwargs: Any,
    ) -> Self:
        """Load a fuser (or several) with the models that it names.

        Args:
            source: folder or hub id of a fuser, of a model saved by :meth:`save_pretrained`, or a list of fusers; or
                ``copy``, which needs no file.
            receiver: in place of the recorded one, as in :meth:`from_models`.
            sharer: in place of the recorded one, as in :meth:`from_models`.
            mode: how several sharers are combined; by default as recorded.
            aligner: in place of the recorded one.
            allow_mismatch: accept other weights, tokenizers or templates of the same structure.
            fuser_dtype: type of the fuser's weights.
            **load_kwargs: as in :meth:`from_models`.
        """
        if isinstance(source, str) and without_file(source):
            if receiver is None or sharer is None:
                raise FuserError(f"{source!r} has no models of its own; pass receiver=... and sharer=....")
            options: dict[str, Any] = {"fuser": source, "aligner": aligner, "mode": mode or "sequential"}
            return cls.from_models(receiver, sharer, **options, **load_kwargs)
        folders, manifest = [source] if isinstance(source, str | Path) else list(source), {}
        if isinstance(source, str | Path) and (path := resolve(source) / _MANIFEST).exists():
            manifest = read_json_object(path, FuserError)
            folders = [path.parent / name for name in manifest["fusers"]]
        fusers = [load_fuser(folder, dtype=fuser_dtype) for folder in folders]
        receiver = receiver if receiver is not None else _recorded(fusers[0], "receiver")
        sharer = sharer if sharer is not None else [_recorded(fuser, "sharer") for fuser in fusers]
        ours, theirs = load_models(receiver, sharer, load_kwargs)
        if aligner is None and "aligner" in manifest:
            aligner = make_aligner(manifest["aligner"])
        for fuser in fusers:
            nn.Module.to(fuser, ours.device)
        chosen = mode or manifest.get("mode", "sequential")
        return cls(ours, theirs, fusers, aligner=aligner, mode=chosen, allow_mismatch=allow_mismatch)

    @classmethod
    def from_published(
        cls,
        folder: str | Path | Sequence[str | Path],
        *,
        receiver: Any = None,
        sharer: Any = None,
        mode: FusionMode | None = None,
        aligner: Aligner | None = None,
        dtype: Any = None,
        **load_kwargs: Any,
    ) -> Self:
        """Load published checkpoints (``projector_*.pt``).

        Args:
            folder: a checkpoint folder, or a list of them with one sharer each.
            receiver: as in :meth:`from_models`; by default the ``base_model`` of the checkpoint.
            sharer: the same for ``teacher_model``.
            mode: how several sharers are combined; by default what the checkpoint says, else ``sequential``.
            aligner: by default what the checkpoint was trained with.
            dtype: type of the models and the fuser.
            **load_kwargs: see :func:`c2c.loading.load`.
        """
        folders = [Path(f) for f in ([folder] if isinstance(folder, str | Path) else folder)]
        names = [read_names(f) for f in folders]
        receiver = receiver if receiver is not None else names[0].get("receiver")
        sharer = sharer if sharer is not None else [name.get("sharer") for name in names]
        if receiver is None or sharer == [None]:
            raise FuserError(f"{folders[0]} does not name its models; pass receiver=... and sharer=....")
        ours, theirs = load_models(receiver, sharer, load_kwargs | {"dtype": dtype})
        if len(theirs) != len(folders):
            raise FuserError(
                f"got {len(folders)} checkpoints and {len(theirs)} sharers; give one sharer per checkpoint."
            )
        fusers: list[Fuser] = []
        for f, model in zip(folders, theirs, strict=True):
            new = import_published(f, receiver=ours.geometry, sharer=model.geometry, dtype=dtype or ours.dtype)
            fusers.append(made_for(new, ours, model))
        chosen: Any = mode or names[0].get("mode", "sequential")
        return cls(ours, theirs, fusers, aligner=aligner, mode=chosen)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the fusers; the models are named, not copied. A single fuser lies in the folder itself."""
        names = [""] if len(self.fusers) == 1 else [f"fuser_{i + 1}" for i in range(len(self.fusers))]
        manifest = {"fusers": names, "mode": self.mode, "aligner": self.aligner.to_dict()}

        def write(temporary: str) -> None:
            for name, fuser in zip(names, self.fusers, strict=True):
                fuser.save_pretrained(Path(temporary) / name)  # type: ignore[operator]
            write_json(Path(temporary) / _MANIFEST, manifest)

        save_atomically(Path(folder), write)


def made_for(fuser: Fuser, receiver: Receiver, sharer: Sharer) -> Fuser:
    """Record the models of a new fuser, and move it beside the receiver."""
    fuser.config.sharer, fuser.config.receiver = sharer.identity.to_dict(), receiver.identity.to_dict()
    nn.Module.to(fuser, receiver.device)
    fuser.eval()
    return fuser


def load_models(
    receiver: Any, sharer: Any, load_kwargs: dict[str, Any], once: bool = False
) -> tuple[Receiver, list[Sharer]]:
    """Load the models of a pair as :meth:`Pretrained.from_models` takes them; loaded ones are taken as they are.

    Args:
        receiver: the model that answers.
        sharer: the models that share.
        load_kwargs: how to load them.
        once: load a sharer that is named like the receiver only once; neither can then be released alone.

    Raises:
        PromptError: options for models that are loaded already. ModelLoadError: a model can't be found.
    """
    if "tokenizer" in load_kwargs:
        raise PromptError(
            "tokenizer=... would go to both models; pass Receiver.from_pretrained(source, tokenizer=...) and "
            "Sharer.from_pretrained(source, tokenizer=...) as receiver and sharer."
        )
    several = list(sharer) if isinstance(sharer, list | tuple) else [sharer]
    useless = sorted(name for name, value in load_kwargs.items() if value is not None)
    if useless and all(isinstance(model, LanguageModel) for model in (receiver, *several)):
        raise PromptError(
            f"{', '.join(useless)} can't be applied to models that are loaded already. Give it to "
            "Receiver.from_pretrained and Sharer.from_pretrained."
        )
    ours_kwargs = {name: value for name, value in load_kwargs.items() if name != "sharer_dtype"}
    parse_dtype(load_kwargs.get("sharer_dtype"))  # what is wrong with the sharer, before the receiver is loaded
    if str(load_kwargs.get("device_map")) == "meta":
        raise ModelLoadError("device_map is 'meta', which holds no weights. Expected such as cpu, cuda or auto.")
    for one in (receiver, *several):
        if isinstance(one, str | Path) and not str(one).startswith(_URL):
            locate(str(one))
    their_kwargs = ours_kwargs | {"dtype": load_kwargs.get("sharer_dtype") or load_kwargs.get("dtype")}
    ours = receiver if isinstance(receiver, Receiver) else Receiver.from_pretrained(receiver, **ours_kwargs)
    if once and isinstance(receiver, str | Path):
        again = Sharer(ours.model, ours.tokenizer, ours.name)
        several = [again if str(one) == str(receiver) else one for one in several]
    shared = receiver if their_kwargs["dtype"] == load_kwargs.get("dtype") else None
    return ours, [
        one if isinstance(one, Sharer) else _variant(one, ours, shared) or _load_sharer(one, their_kwargs)
        for one in several
    ]


def _variant(source: Any, receiver: Receiver, loaded_from: Any) -> Sharer | None:
    """Return a sharer around the receiver's weights, where the two differ in their LoRA adapters alone; else None."""
    if not all(isinstance(one, str | Path) for one in (source, loaded_from)) or str(source) == str(loaded_from):
        return None
    base = base_name(source)
    if base != base_name(loaded_from):
        return None
    return Sharer(
        with_adapter(receiver.model, None if base == str(source) else source), receiver.tokenizer, str(source)
    )


def _load_sharer(source: Any, load_kwargs: dict[str, Any]) -> Sharer:
    if isinstance(source, str) and source.startswith(_URL):
        from c2c.remote import RemoteSharer  # brings an HTTP client along

        return RemoteSharer(source)
    return Sharer.from_pretrained(source, **load_kwargs)


def _recorded(fuser: Fuser, role: str) -> str:
    recorded: ModelIdentity | None = fuser.config.identity(role)
    name = recorded.name if recorded is not None else published_names(fuser.config.training).get(role)
    if name is None:
        raise FuserError(f"this fuser does not say which {role} it was made for; pass {role}=....")
    return name
