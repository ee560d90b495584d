"""Endpoints of ``c2c serve``: one module each, with a function ``router(service)`` that returns its routes.

Keys, limits, logs and the form of errors are those of :mod:`c2c.serving.http_server` for all of them.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fastapi import APIRouter


def routers(service: Any) -> list[APIRouter]:
    """Return the routers of all endpoints, for a :class:`~c2c.serving.app.Service`."""
    return [import_module(f"{__name__}.{module.name}").router(service) for module in iter_modules(__path__)]
