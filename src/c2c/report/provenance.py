"""Read the provenance of a result file: what makes two evaluations comparable, and what a report shows of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from c2c.report.names import short_command, short_path

# Settings that change numbers, with the value that holds where a file has none.
_DEFAULTS: dict[str, Any] = {"mode": "", "limit": None, "dtype": None, "message_tokens": 256}


def mapping(data: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return the object under nested keys, empty where there is none."""
    value: Any = data
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def data_sources(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the data sources without empty keys, so that keys which later versions add make no difference."""
    entries = mapping(provenance, "config").get("data")
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return [{key: value for key, value in entry.items() if value} for entry in entries]


def comparison_key(unit: str, provenance: Mapping[str, Any]) -> str:
    """Return a key that is equal for evaluations of one comparison: the same models, data and settings."""
    hashes = mapping(provenance, "data")
    names = [str(source.get("path") or source.get("dataset")) for source in data_sources(provenance)]
    data = {name: hashes.get(name) for name in names or hashes}  # without the dev data of a router

    def weights(identity: Any) -> Any:  # since one model has many names
        if isinstance(identity, list):  # several sharers
            return [weights(one) for one in identity]
        return identity.get("weights") or identity.get("name") if isinstance(identity, dict) else identity

    models = [weights(provenance.get(role)) for role in ("receiver", "sharer")]
    return json.dumps([unit, models, data, settings_of(provenance)], sort_keys=True)


def settings_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that change numbers, without defaults.

    Systems, dev items, timing and seeds are not among them: runs that differ in these are runs of one comparison.
    """
    config, training = mapping(provenance, "config"), mapping(provenance, "training", "config")
    defaults = _DEFAULTS | ({"max_new_tokens": 32} if config.get("mode") == "generate" else {})
    settings = {key: config[key] for key, default in defaults.items() if config.get(key, default) != default}
    training = {key: value for key, value in training.items() if key != "seed"}
    return settings | {str(i): source for i, source in enumerate(data_sources(provenance))} | {"training": training}


def provenance_lines(data: Mapping[str, Any]) -> dict[str, str]:
    """Return what a report shows of where the numbers of a result file come from, label to text."""
    provenance = mapping(data, "provenance")
    lines = {
        "command": short_command(str(provenance.get("command", ""))),
        "seed": mapping(provenance, "config").get("seed"),
        "versions": ", ".join(f"{name} {version}" for name, version in mapping(provenance, "versions").items()),
        "fuser": provenance.get("fuser") or "not recorded",
    }
    labels = {"fusers": "fuser", "reused": "fuser of the reused answers of", "data": "data"}
    for key, label in labels.items():
        lines |= {f"{label} {short_path(name, 2)}": value for name, value in mapping(provenance, key).items()}
    for role in ("receiver", "sharer"):
        lines[f"{role} weights"] = mapping(provenance, role).get("weights")
    for rule in ("router", "abstain"):
        numbers = mapping(data, rule)
        lines[rule] = ", ".join(f"{key} {value:g}" for key, value in numbers.items() if isinstance(value, int | float))
    for reason, count in mapping(data, "dropped").items():
        lines[f"not evaluated, {short_path(reason, 2)}"] = count
    lines["evaluation"] = provenance.get("key")
    return {label: str(text) for label, text in lines.items() if text not in (None, "")}


def flatten(settings: Mapping[Any, Any]) -> dict[str, str]:
    """Return the settings as text, nested ones under their own names."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        flat |= flatten(value) if isinstance(value, dict) else {name: str(value)}
    return flat
