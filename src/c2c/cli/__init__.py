"""The ``c2c`` command."""

from c2c.cli.app import app, main

__all__ = ["app", "main"]
