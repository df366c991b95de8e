"""The quantization lab: what each way of storing the base costs and gives, measured side by side."""

from finetune.bench.lab.compare import compare

__all__ = ["compare"]
