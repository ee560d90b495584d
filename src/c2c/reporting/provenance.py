"""Where numbers come from: what makes two evaluations comparable, and what is shown of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from c2c.reporting.names import portable_command, relative

# Settings that change numbers, with the value that is taken for granted where a file does not say.
_DEFAULTS: dict[str, Any] = {"mode": "", "limit": None, "dtype": None, "message_tokens": 256}


def settings_of(provenance: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What tells an evaluation from others of the same pair on the same data; defaults are left out.

    Systems, dev items, timing and seeds do not: runs that differ in them are runs of one comparison.
    """
    defaults = _DEFAULTS | ({"max_new_tokens": 32} if config.get("mode") == "generate" else {})
    settings = {key: config[key] for key, usual in defaults.items() if config.get(key, usual) != usual}
    trained = {key: value for key, value in training(provenance).items() if key != "seed"}
    return settings | {"data": _given(config.get("data")), "training": trained}


def data_hashes(provenance: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The hashes of the data that is reported, without that of dev."""
    hashes = provenance.get("data")
    dev = dev_names(config)
    return {name: value for name, value in hashes.items() if name not in dev} if isinstance(hashes, dict) else hashes


def dev_names(config: Mapping[str, Any]) -> set[str]:
    """Names of the sources that rules were fitted on, and that nothing is reported of."""
    reported, dev = ({str(one.get("path") or one.get("dataset")) for one in _given(config.get(key))} for key in _DATA)
    return dev - reported


_DATA = ("data", "dev")


def training(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the fuser was trained with, as far as they are recorded."""
    record = provenance.get("training")
    config = record.get("config") if isinstance(record, dict) else None
    return dict(config) if isinstance(config, dict) else {}


def who(provenance: Mapping[str, Any]) -> list[Any]:
    """What tells the models from others: their weights, since one model lies under many names."""
    return [_who(provenance.get(role)) for role in ("receiver", "sharer")]


def shown(data: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, str]:
    """What a report shows of an evaluation, label to text."""
    lines = {"command": portable_command(str(provenance.get("command", "")))}
    versions = provenance.get("versions")
    if isinstance(versions, dict):
        lines["versions"] = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    lines["fuser"] = str(provenance.get("fuser") or "not recorded")
    others = provenance.get("fusers")
    if isinstance(others, dict):
        lines |= {f"fuser {name}": str(digest) for name, digest in sorted(others.items())}
    reused = provenance.get("reused")
    if isinstance(reused, dict):
        for digest in sorted(set(reused.values())):
            names = sorted(name for name, source in reused.items() if source == digest)
            lines[f"answered beside fuser {digest}"] = ", ".join(names)
    for role in ("receiver", "sharer"):
        identity = provenance.get(role)
        if isinstance(identity, dict) and identity.get("weights"):
            lines[f"{role} weights"] = str(identity["weights"])
    lines |= _data_lines(provenance)
    dropped = data.get("dropped")
    if isinstance(dropped, dict):
        lines |= {f"not evaluated, {relative(reason, 2)}": str(count) for reason, count in sorted(dropped.items())}
    lines["evaluation"] = str(provenance.get("key") or "not recorded")
    return {label: text for label, text in lines.items() if text}


def _data_lines(provenance: Mapping[str, Any]) -> dict[str, str]:
    hashes, config = provenance.get("data"), provenance.get("config")
    dev = dev_names(config) if isinstance(config, dict) else set()
    lines: dict[str, str] = {}
    for name, digest in sorted(hashes.items()) if isinstance(hashes, dict) else ():
        kind = "dev" if name in dev else "data"
        label = f"{kind} {relative(name, 2)}"
        lines[label if label not in lines else f"{kind} {name}"] = str(digest or "not a file")
    return lines


def _given(sources: Any) -> list[dict[str, Any]]:
    """Sources with the keys that say something, so that keys of later versions make no difference."""
    entries = sources if isinstance(sources, list) else []
    return [{key: value for key, value in one.items() if value} for one in entries if isinstance(one, dict)]


def _who(identity: Any) -> Any:
    if isinstance(identity, list):
        return [_who(one) for one in identity]
    return identity.get("weights") or identity.get("name") if isinstance(identity, dict) else identity
