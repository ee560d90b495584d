"""The base class of fusers: a ``PreTrainedModel`` from aligned cache entries to fused ones, and how one is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from c2c import rope
from c2c.errors import FuserError, ModelLoadError, did_you_mean
from c2c.identity import ModelIdentity
from c2c.kv_cache import KeyValue, KVGeometry
from c2c.loading import parse_dtype
from c2c.rope import Rotary
from c2c.utils import file_hash, read_json_object, save_atomically
from c2c.version import __version__

_EXPECTED = "Expected a fuser's folder, as `c2c train` and `c2c convert` write it, or a hub id like 'owner/name'."
_LARGEST = 2**16  # of a width; what is larger is a slip, and would not fit into memory
_CONVERT = "run `c2c convert`, or C2CModel.from_published."


@dataclass(frozen=True)
class Entries:
    """Aligned cache entries of one model, one item per fused receiver layer.

    Attributes:
        keys: each ``[batch, kv_heads, tokens, head_dim]``, as they lie in the cache.
        values: the same shapes.
        rotary: the rotary tables of these tokens, for fusers that take the rotation off; None without rotary.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    rotary: Sequence[Rotary] | None = None

    def layer(self, index: int) -> KeyValue:
        """Return keys and values of one item."""
        return self.keys[index], self.values[index]

    def channels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Join keys without rotation and values to ``[layers, batch * tokens, 2 * kv_heads * head_dim]``.

        Converted to ``dtype`` before the rotation is removed, which bfloat16 would round.
        """
        keys, values = torch.stack(list(self.keys)).to(dtype), torch.stack(list(self.values)).to(dtype)
        if self.rotary is not None:
            keys = rope.stack(self.rotary).undo(keys)
        return torch.cat([x.transpose(2, 3).flatten(3).flatten(1, 2) for x in (keys, values)], dim=-1)

    def plus(self, keys: Tensor, values: Tensor) -> list[KeyValue]:
        """Add to all entries; ``[layers, batch, kv_heads, tokens, head_dim]`` each, keys without rotation."""
        if self.rotary is not None:
            keys = rope.stack(self.rotary).apply(keys)
        own_keys, own_values = torch.stack(list(self.keys)), torch.stack(list(self.values))
        fused_keys, fused_values = own_keys + keys.to(own_keys.dtype), own_values + values.to(own_values.dtype)
        return list(zip(fused_keys.unbind(), fused_values.unbind(), strict=True))


def split_channels(x: Tensor, batch: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Undo :meth:`Entries.channels`: keys and values, ``[layers, batch, kv_heads, tokens, head_dim]`` each."""
    shaped = x.view(len(x), batch, -1, 2, kv_heads, x.shape[-1] // (2 * kv_heads))
    keys, values = shaped.permute(3, 0, 1, 4, 2, 5).unbind()
    return keys, values


@dataclass(frozen=True)
class AlignedEntries:
    """Entries of both models at corresponding tokens, which a new fuser is initialised from.

    Attributes:
        sharer: the sharer's entries.
        receiver: the receiver's own entries of the same text.
        weight: weight of each token pair, ``[layers, pairs]``; None for equal weights.
    """

    sharer: Entries
    receiver: Entries
    weight: Tensor | None = None

    def channels(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what a map of channels is fitted to; see :meth:`Entries.channels`."""
        return self.sharer.channels(), self.receiver.channels(), self.weight


def number(default: float | None, low: float, high: float = math.inf, whole: bool = False) -> Any:
    """Declare a field of a fuser's config that is a number in a range; None is for a field without default."""
    expected = f"{'an integer' if whole else 'a number'} from {low:g}" + f" to {high:g}" * (high < math.inf)

    def check(value: Any) -> None:
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and low <= value <= high
        if not ((fits and value < math.inf) or value is None is default):
            raise ValueError(f"{value!r} was given; expected {expected}")

    return validated_field(check, default=default)


def size(default: int | None, low: int = 1) -> Any:
    """Declare a field that is a size of weights."""
    return number(default, low, _LARGEST, whole=True)


def _check_kv(kv: dict[str, Any]) -> None:
    """Refuse a cache without heads or channels."""
    wrong = {name: value for name, value in kv.items() if type(value) is not int or not 1 <= value <= _LARGEST}
    if wrong:
        raise ValueError(f"{wrong} was given; expected integers from 1 to {_LARGEST}")


@strict
class FuserConfig(PreTrainedConfig):
    """Configuration that all fuser families share.

    Attributes:
        layer_map: for each receiver layer the sharer layer that it reads, or None.
        sharer_kv: geometry of the sharer's cache (layers, kv_heads, head_dim).
        receiver_kv: geometry of the receiver's cache.
        sharer: identity of the sharer, None if not recorded.
        receiver: identity of the receiver, None if not recorded.
        alignment: the aligner that the fuser was trained with.
        training: record of its training; None for an untrained fuser.
        c2c_version: the package version that wrote it.
    """

    model_type = "c2c_fuser"
    layer_map: list[int | None] = field(default_factory=list)
    sharer_kv: dict[str, int] = validated_field(_check_kv, default_factory=dict)
    receiver_kv: dict[str, int] = validated_field(_check_kv, default_factory=dict)
    sharer: dict[str, Any] | None = None
    receiver: dict[str, Any] | None = None
    alignment: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    c2c_version: str | None = None

    @property
    def geometries(self) -> tuple[KVGeometry, KVGeometry]:
        """Geometry of the sharer's and of the receiver's cache."""
        return KVGeometry(**self.sharer_kv), KVGeometry(**self.receiver_kv)

    @property
    def fused_layers(self) -> list[int]:
        """Receiver layers that are fused, in order."""
        return [index for index, source in enumerate(self.layer_map) if source is not None]

    @property
    def source_layers(self) -> list[int]:
        """For each fused receiver layer, the sharer layer that it reads."""
        return [source for source in self.layer_map if source is not None]

    def identity(self, role: str) -> ModelIdentity | None:
        """Return the recorded identity of the ``sharer`` or ``receiver``."""
        data = getattr(self, role)
        return ModelIdentity.from_dict(data) if data else None


class Fuser(PreTrainedModel):
    """Projects a sharer's cache entries into the receiver's space and merges them.

    A family sets ``config_class`` and ``family``, and implements ``forward`` and ``gates``; the other class attributes
    and the hooks (``initialise_from_data`` to ``output_length``) have defaults. An untrained fuser should leave the
    receiver as it is.

    Attributes:
        family: name of the family.
        context: ``shared``: both models read the same prompt, and entries are merged; ``private``: the sharer has read
            something else, and its entries are added.
        needs_rotary: whether keys are read without their rotation.
        closed_form: whether ``initialise_from_data`` is the whole training, without gradients.
        keeps_tokens: whether private context is what the receiver itself would make of the same tokens, so that it is
            read and placed like a passage in the receiver's prompt.
    """

    config_class = FuserConfig
    base_model_prefix = "fuser"
    main_input_name = "sharer"
    family: ClassVar[str]
    context: ClassVar[str] = "shared"
    needs_rotary: ClassVar[bool] = False
    closed_form: ClassVar[bool] = False
    keeps_tokens: ClassVar[bool] = False

    @abstractmethod
    def forward(self, sharer: Entries, receiver: Entries) -> list[KeyValue]:
        """Fuse.

        Args:
            sharer: entries of the sharer, one item per fused receiver layer (the layer map is already applied).
            receiver: entries of the receiver at the same positions.

        Returns:
            The receiver's new keys and values, one pair per fused layer, shapes as in ``receiver``.
        """

    @abstractmethod
    def gates(self) -> Tensor:
        """How open each fused layer is at inference, from 0 to 1: ``[layers, 2]``, keys and values."""

    def initialise_from_data(self, data: Iterable[AlignedEntries]) -> bool:
        """Set parameters from entries of training prompts, before the first step; by default nothing is set.

        Returns:
            Whether the fuser is of use already, so that training must beat it: it is then scored as step 0.
        """
        return False

    def tune(self, score: Callable[[], float]) -> dict[str, Any]:
        """Choose hyperparameters of a fitted ``closed_form`` fuser by a dev score; by default there are none.

        Returns:
            What was tried and chosen, for the training record.
        """
        return {}

    def on_train_begin(self, steps: int) -> None:
        """Prepare for a training of ``steps`` optimizer steps."""

    def on_step(self, step: int) -> None:
        """Follow schedules of the family's own; called before optimizer step ``step``, counted from 0."""

    def check_models(self, receiver: ModelIdentity, sharer: ModelIdentity) -> None:
        """Refuse a pair of models that this family can't serve; raises MismatchError. By default all are accepted."""

    def output_length(self, positions: int) -> int:
        """Return how many entries a fuser of private context makes of ``positions`` handed-over ones."""
        return positions

    def _init_weights(self, module: nn.Module) -> None:
        """Families initialise their weights in the constructor."""

    @classmethod
    def from_geometry(
        cls, sharer: KVGeometry, receiver: KVGeometry, layer_map: list[int | None], /, **options: Any
    ) -> Self:
        """Make an untrained fuser for these cache shapes; ``options`` go to the family's config.

        Raises:
            FuserError: an option that the family does not have, or with an impossible value.
        """
        base = {entry.name for entry in dataclasses.fields(FuserConfig)}
        own = sorted({entry.name for entry in dataclasses.fields(cls.config_class)} - base)
        unknown = sorted(set(options) - set(own), key=str)
        if unknown:  # transformers would store and ignore it
            raise FuserError(
                f"fuser_options of {cls.family}: unknown {', '.join(unknown)}."
                f"{''.join(did_you_mean(name, own) for name in unknown)} Known: {', '.join(own) or 'none'}."
            )
        shapes: dict[str, Any] = {"sharer_kv": sharer.to_dict(), "receiver_kv": receiver.to_dict()}
        try:
            return cls(cls.config_class(layer_map=layer_map, c2c_version=__version__, **shapes, **options))
        except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
            if isinstance(error, FuserError) or not options:
                raise
            raise FuserError(f"fuser_options of {cls.family} are {options}, which can't be: {error}") from error

    @property
    def trained(self) -> bool:
        """Whether the fuser has been trained. An untrained one leaves the receiver as it is."""
        return self.config.training is not None

    def expected_identity(self, role: str, given: ModelIdentity) -> ModelIdentity:
        """Return the identity of the ``sharer`` or ``receiver`` that this fuser was made for.

        Where none is recorded, it is the recorded cache geometry with the architecture of the model at hand.
        """
        recorded: ModelIdentity | None = self.config.identity(role)
        if recorded is not None:
            return recorded
        geometry = getattr(self.config, f"{role}_kv")
        return ModelIdentity("unrecorded", None, given.architecture, geometry, None, None, None, None)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config and weights. Files are complete or absent: each is renamed into place when it is written."""
        save_atomically(Path(save_directory), lambda folder: super(Fuser, self).save_pretrained(folder, **kwargs))


def load_fuser(source: str | Path, **kwargs: Any) -> Fuser:
    """Load a fuser of any family from a folder or hub id.

    Raises:
        ModelLoadError: no such folder or hub id.
        FuserError: the folder holds no fuser.
    """
    from c2c.fusers import family

    folder = resolve(source)
    path = folder / "config.json"
    if not path.exists():
        several = sorted(part.parent.name for part in folder.glob("fuser_*/config.json"))
        if several:
            raise FuserError(
                f"{source} holds {len(several)} fusers: name one of them, {', '.join(several)}; or load them all with "
                "C2CModel.from_pretrained."
            )
        published = (folder / "final").is_dir() or list(folder.glob("projector_*.pt"))
        hint = f" It looks like a published checkpoint: {_CONVERT}" if published else ""
        raise FuserError(f"{source} holds no fuser: config.json is missing.{hint} {_EXPECTED}")
    kind = read_json_object(path, FuserError).get("model_type")
    if not str(kind).startswith("c2c_fuser_"):
        raise FuserError(
            f"{source} is not a fuser: model_type is {kind!r}, expected 'c2c_fuser_<family>'. A model goes to "
            f"--receiver or --sharer; for a published checkpoint {_CONVERT}"
        )
    cls: Any = family(str(kind).removeprefix("c2c_fuser_"))
    if "dtype" in kwargs:
        kwargs["dtype"] = parse_dtype(kwargs["dtype"])
    try:
        fuser, info = cls.from_pretrained(str(folder), output_loading_info=True, **kwargs)
    except FuserError:
        raise
    except Exception as error:  # a config with values of other types fails in many ways
        raise FuserError(f"{folder} holds no whole fuser (config.json and model.safetensors): {error}") from error
    # refuse what transformers would only warn about: missing, foreign or misshapen tensors
    wrong = {what: sorted(map(str, info[what])) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise FuserError(f"{folder / 'model.safetensors'} does not fit its config.json: {wrong}")
    result: Fuser = fuser.eval()
    return result


def resolve(source: str | Path) -> Path:
    """Return the local folder of a fuser, downloaded first if ``source`` is a hub id.

    Raises:
        ModelLoadError: a file; no such folder or hub id.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        hint = f", perhaps of the fuser in {path.parent}"
        with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            if "manifest" in (file.metadata() or {}):
                hint = " of a handoff, which goes to sharer_messages as Handoff.load(FILE)"
        raise ModelLoadError(f"{source} is a file{hint}. {_EXPECTED}")
    beside = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    meant = did_you_mean(path.name, beside)
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ModelLoadError(f"no such folder: {source}.{meant} {_EXPECTED}")
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except Exception as error:  # the client raises what its transport raises
        raise ModelLoadError(
            f"could not get fuser {source!s}: not a local folder, and the hub said: {error}.{meant} {_EXPECTED}"
        ) from error


def without_file(source: Any) -> bool:
    """Whether a source names a family that has nothing to load, such as ``copy``."""
    from c2c.fusers import families

    return isinstance(source, str) and source in families() and families()[source].keeps_tokens


def fuser_hash(folder: str) -> str:
    """Return the sha256 of a fuser's weights; of the family's name where there are none."""
    if without_file(folder):
        return hashlib.sha256(folder.encode()).hexdigest()
    return file_hash(resolve(folder) / "model.safetensors")


def training_facts(fuser: Any) -> dict[str, Any]:
    """Return what distinguishes one trained fuser from another, without its lists of data."""
    record = fuser.config.training or {}
    config = record.get("config")
    settings = config.items() if isinstance(config, dict) else ()
    facts = {key: value for key, value in settings if key not in ("train", "dev", "exclude")}
    return {"family": fuser.family, "step": record.get("step"), "config": facts}
