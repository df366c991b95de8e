"""A fixture of the tests of fused layers."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.kernels import blocks


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the fused steps that are really taken on the way forward."""
    taken: Counter[str] = Counter()

    def counted(name: str, inner: Any) -> Any:
        def count(*arguments: Any, **named: Any) -> Any:
            taken[name] += 1
            return inner(*arguments, **named)

        return count

    joined = blocks.FusedLinears.__call__
    monkeypatch.setattr(blocks, "attend", counted("attention", blocks.attend))
    monkeypatch.setattr(blocks, "RmsNorm", SimpleNamespace(apply=counted("norm", blocks.RmsNorm.apply)))
    monkeypatch.setattr(blocks.FusedLinears, "__call__", counted("product", joined))
    return taken
