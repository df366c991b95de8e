"""The quantization lab: what each way of storing the base costs and gives, and what tuning on it comes to, side by side."""

from finetune.bench.lab.compare import Further, compare
from finetune.bench.lab.tuning import Budget, tune

__all__ = ["Budget", "Further", "compare", "tune"]
