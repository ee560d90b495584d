"""The version of the package, and nothing else: it is read without importing torch."""

__version__ = "0.1.0"
