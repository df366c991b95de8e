"""Asks any OpenAI-compatible server whether it serves what was trained.

Example::

    target = Target(url="http://127.0.0.1:8000", model="mine")
    verified = verify(Path("outputs/mine"), target, rows=32)
    print(verified.passed, verified.checks)
"""

from finetune.verify.checks import Check
from finetune.verify.run import Bounds, Target, Verified, verify

__all__ = ["Bounds", "Check", "Target", "Verified", "verify"]
