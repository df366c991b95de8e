"""What a training step reads from the device: each read makes the program wait for it."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from finetune.train.sft_trainer import Trainer
from tests.fixtures.trainings import train

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
"""How a program waits for a device. A boolean index, once a micro-batch, is not among them."""

STEPS = 3


class Reads:
    """Counts the reads of each part of a step: ``micro-batch`` begins when its tensors are on the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.part = ""
        self.parts, self.found = Counter[str](), Counter[tuple[str, str]]()
        for name in READS:
            monkeypatch.setattr(Tensor, name, self.counting(name, getattr(Tensor, name)))
        self.mark(monkeypatch, "_prepare_inputs", after="micro-batch")
        self.mark(monkeypatch, "training_step", after="")
        self.mark(monkeypatch, "_clip_grad_norm", before="optimizer")
        self.mark(monkeypatch, "_maybe_log_save_evaluate", before="")

    def counting(self, name: str, original: Any) -> Any:
        def count(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            if self.part:
                self.found[self.part, name] += 1
            return original(tensor, *arguments, **named)

        return count

    def mark(
        self, monkeypatch: pytest.MonkeyPatch, method: str, *, before: str | None = None, after: str | None = None
    ) -> None:
        original = getattr(Trainer, method)

        def marked(trainer: Any, *arguments: Any, **named: Any) -> Any:
            self.enter(before)
            result = original(trainer, *arguments, **named)
            self.enter(after)
            return result

        monkeypatch.setattr(Trainer, method, marked)

    def enter(self, part: str | None) -> None:
        if part is not None:
            self.part = part
            self.parts[part] += 1


def test_a_step_reads_twice_in_a_micro_batch_and_once_before_the_optimizer(
    tiny_base: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, steps=STEPS, evaluations=0, dropout=0.0)
    micro_batches = reads.parts["micro-batch"]
    assert micro_batches > STEPS, "a step accumulates"
    assert reads.found == Counter(
        {
            ("micro-batch", "tolist"): micro_batches,  # lengths of the documents, where torch's varlen cannot compute
            ("micro-batch", "__bool__"): micro_batches,  # transformers looks for packed documents
            ("optimizer", "__bool__"): STEPS,  # a step that is not finite is not taken
        }
    )
