"""Options of the servers, and their keys. Imports neither torch nor a web framework, so that ``--help`` stays fast."""

# ruff: noqa: RUF009 - option() returns a dataclass field

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from c2c.config import check_values, option
from c2c.serving.errors import ApiError, ServerError
from c2c.utils import argument_text

EngineName = Literal["transformers", "vllm"]
OnFailure = Literal["raise", "receiver_only"]
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\sA-Z]+")


@dataclass(frozen=True, kw_only=True)
class HTTPConfig:
    """Configure one HTTP server; ``c2c serve`` and ``c2c share`` add their own."""

    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0 for all.")
    port: int = option(8000, "Port to listen at; 0 for a free one.", min=0, max=65535)
    api_key: list[str] | None = option(None, "Bearer key that clients must send; may be repeated.", repr=False)
    key_file: Path | None = option(None, "File with such keys, one a line.")
    insecure: bool = option(False, "Listen on an address that others can reach without any key.")
    tls_cert: Path | None = option(None, "Certificate file for TLS.")
    tls_key: Path | None = option(None, "Its private key.")
    tls_client_ca: Path | None = option(None, "Certificate authority that client certificates must be signed by.")
    timeout: float = option(300.0, "Seconds that a request may take, waiting included.", min=0.1)
    max_body_mb: float = option(4.0, "Megabytes of a request at most.", min=0.001)
    rate: int = option(0, "Requests per minute and key (or address) at most; 0 for no limit.", min=0)
    connections: int | None = option(None, "Open connections at most; None for no limit.", cli=False)

    key_variable = "C2C_API_KEY"  # environment variable with keys, separated by commas or spaces

    @property
    def max_body(self) -> int:
        """Bytes of a request at most."""
        return int(self.max_body_mb * 1e6)

    @property
    def exposed(self) -> bool:
        """Whether others than this machine can reach the server."""
        return not is_loopback(self.host)

    def __post_init__(self) -> None:
        """Check what any server needs right.

        Raises:
            ConfigError: a value out of its range. ServerError: one that can't be used.
        """
        check_values(self)
        for name in ("host", "name"):
            if getattr(self, name, None) is not None:
                object.__setattr__(self, name, argument_text(getattr(self, name), f"--{name}", ServerError))
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ServerError("TLS needs both --tls-cert and --tls-key.")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ServerError("--tls-client-ca needs --tls-cert and --tls-key: without TLS there are no certificates.")
        if self.tls_cert is not None:
            self._check_tls()

    def _check_tls(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(str(self.tls_cert), self.tls_key)
            context.load_verify_locations(self.tls_client_ca or self.tls_cert)
        except OSError as error:
            files = ", ".join(str(file) for file in (self.tls_cert, self.tls_key, self.tls_client_ca) if file)
            raise ServerError(f"the TLS files {files} can't be used: {error}") from error

    def keys(self) -> KeyRing:
        """Collect the keys of the option, else of the environment, and those of the key file.

        Raises:
            ServerError: an empty key, an unreadable key file, or no key and an address that others can reach.
        """
        keys = self.api_key or os.environ.get(self.key_variable, "").replace(",", " ").split()
        given = [argument_text(key, "an API key", ServerError) for key in keys]
        if any(not key.strip() for key in given):
            raise ServerError("an empty API key was given: give some characters, or leave the option out.")
        ring = KeyRing(given + (read_keys(self.key_file) if self.key_file is not None else []))
        if not ring and not self.insecure and self.exposed:
            raise ServerError(
                f"{self.host} can be reached by others, who could use this server without a key. Set "
                f"{self.key_variable}, or pass --insecure if that is what you want."
            )
        return ring


@dataclass(frozen=True, kw_only=True)
class ServeConfig(HTTPConfig):
    """Configure ``c2c serve``: the models, the engine, and its limits."""

    receiver: str | None = option(None, "Alias, hub id, folder or GGUF; by default the fuser's.")
    sharer: str | None = option(None, "Alias, hub id, folder, GGUF, or URL of c2c share; by default the fuser's.")
    on_failure: OnFailure | None = option(
        None,
        "When the sharer at a URL is lost, or vLLM does not take a fused cache: an error, or the receiver alone; raise "
        "by default.",
    )
    sharer_timeout: float | None = option(None, "Seconds for a request to the sharer at a URL; 60 by default.", min=0.1)
    sharer_precision: str | None = option(
        None, "In which its entries are sent, such as int8; the model's own by default."
    )
    sharer_ca: Path | None = option(None, "Certificates to trust for it; those of the system by default.")
    engine: EngineName = option(
        "transformers", "What runs the receiver; vllm needs an environment of its own, see the docs."
    )
    sharer_engine: EngineName = option("transformers", "The same for the sharer; vllm only beside --engine vllm.")
    engine_option: list[str] | None = option(
        None, "An argument of vLLM, such as max_model_len=4096; may be repeated.", metavar="NAME=VALUE"
    )
    cors_origin: list[str] | None = option(
        None,
        "Origin whose web pages may use this server, such as https://example.org; * for all; may be repeated. None by "
        "default.",
        metavar="ORIGIN",
    )
    name: str | None = option(None, "What clients call the model; by default the fuser's folder, else 'c2c'.")
    systems: list[str] | None = option(
        None,
        "A system that answers, such as summary_64; may be repeated. Default: c2c, receiver, sharer, text.",
        flag="--system",
    )
    max_queue: int = option(64, "Requests that may wait; more get 429.", min=1)
    max_batch: int = option(16, "Answers that are decoded at once.", min=1)
    kv_tokens: int = option(
        65_536, "KV-cache entries of a batch at most: answers times the longest prompt with its new tokens.", min=1
    )
    batch_window_ms: float = option(10.0, "Milliseconds that a request waits for others to run with it.", min=0)
    max_tokens: int = option(256, "New tokens for requests that do not say how many.", min=1)
    message_tokens: int = option(128, "Tokens of the sharer's text, in text-to-text.", min=1)
    handoffs: int = option(64, "Handoffs kept at a time.", min=0)
    handoff_mb: float = option(1000.0, "Megabytes of all handoffs together.", min=0)
    handoff_seconds: float = option(3600.0, "How long a handoff is kept.", min=1)
    handoffs_per_request: int = option(16, "Handoffs that a request may name.", min=1)
    handoff_folder: Path | None = option(
        None, "Folder in which handoffs survive a restart, readable by its owner alone; in memory only by default."
    )
    dtype: str | None = option(None, "float32, bfloat16, float16 or auto.")
    sharer_dtype: str | None = option(None, "The same for the sharer; --dtype by default.")
    device: str | None = option(None, "Device map: cpu, cuda, auto.")
    allow_mismatch: bool = option(False, "Accept models with other weights than the fuser's.")

    default_systems = ("c2c", "receiver", "sharer", "text")  # as far as the models have them

    def __post_init__(self) -> None:
        """Check the options; raise ServerError, or ConfigError for a value out of its range."""
        super().__post_init__()
        for origin in self.cors_origin or ():
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ServerError(
                    f"--cors-origin is {origin!r}; expected a scheme and host as browsers send them, in small letters, "
                    "with no path and no slash at the end, such as https://example.org or http://localhost:3000."
                )


class KeyRing:
    """Check bearer keys, given in plain text and kept as hashes; without any key everybody is admitted."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.strip().encode()).hexdigest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, authorization: str | None) -> str:
        """Return an id of the key in an ``Authorization`` header: part of its hash; empty without keys.

        Raises:
            ApiError: no key, or an unknown one (401).
        """
        if not self:
            return ""
        scheme, _, given = (authorization or "").partition(" ")
        digest, message = hashlib.sha256(given.strip().encode()).hexdigest(), "the API key is not one of this server's."
        if scheme.lower() != "bearer" or not given.strip():
            message = "no API key was given: send the header 'Authorization: Bearer KEY'."
        # Every hash is compared, each in constant time: the time reveals neither a key nor its place.
        elif sum(hmac.compare_digest(digest, known) for known in self._digests):
            return digest[:16]
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def read_keys(path: str | Path) -> list[str]:
    """Read keys from a file, one a line.

    Raises:
        ServerError: the file can't be read, or a key is shorter than 16 characters.
    """
    advice = f"Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))' > {path}"
    try:
        keys = Path(path).expanduser().read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"the key file {path} can't be read: {error}. {advice}") from error
    if not keys or min(map(len, keys)) < 16:
        raise ServerError(f"the key file {path} must have keys of at least 16 characters, one a line. {advice}")
    return keys


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``, a name or an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
