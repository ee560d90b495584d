"""Other people's tools on a pair of models. Each needs an extra of its own, and none is imported by ``c2c``."""

from c2c.errors import C2CError


class IntegrationError(C2CError):
    """Another tool can't be used as asked."""


class MissingExtraError(IntegrationError, ImportError):
    """The tool is not installed."""
