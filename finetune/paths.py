"""Finds conf/ and data/: next to the package in a checkout, inside it in an installed wheel."""

from pathlib import Path

PACKAGE = Path(__file__).parent
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
SHIPPED = next(folder for folder in (PACKAGE / "shipped", PACKAGE.parent / "data") if folder.is_dir())
