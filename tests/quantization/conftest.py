"""The tiny line that merge, eval and export are tested on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "merge"))

from artifacts import adapter, heldout, line, loud_base  # noqa: F401
