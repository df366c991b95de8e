"""What one stage may ask of another's product without importing the other's room."""

from pathlib import Path
from typing import Protocol


class StageProduct(Protocol):
    """Any stage's product: what it left lies in its folder."""

    @property
    def folder(self) -> Path: ...
