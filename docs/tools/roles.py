"""Docstrings name things as :class:`~package.Thing`; on the site these are code, ``Thing``."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`")


def plain(text: str) -> str:
    """The text with roles as code; after a tilde the last part of a name only."""
    return _ROLE.sub(lambda match: f"`{match[2].rpartition('.')[2] if match[1] else match[2]}`", text)


class Roles(griffe.Extension):
    """Changes each docstring when it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
