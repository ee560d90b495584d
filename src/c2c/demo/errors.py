"""What can go wrong in the demo that is no fault of a model."""

from __future__ import annotations

from c2c.errors import C2CError


class DemoError(C2CError, ValueError):
    """The demo can't do what was asked; says what to do instead."""
