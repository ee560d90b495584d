"""``python -m c2c``."""

from c2c.cli import main

main()
