"""What the proofs work on: the adapted model and its documents, with ways to take a loss, gradients and logits."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from finetune.inference.collate import Collator
from finetune.inference.logits import unwrap
from finetune.inference.rows import IGNORED
from finetune.preflight.batch import Document, learnt
from finetune.quantization.backends import all_tensors

if TYPE_CHECKING:
    from finetune.kernels import Fusion
    from finetune.model import ModelSpec
    from finetune.preflight.config import PreflightConfig
    from finetune.preflight.overfit import OverfitResult
    from finetune.preflight.trial import TrialTrainer
    from finetune.products import PreparedData
    from finetune.trainable import TrainingJob

SAMPLES = 4096
"""Bytes of a frozen weight that are compared, spread evenly over it."""

LOGIT_POSITIONS = 64
"""Positions whose logits are compared, the last ones: all of a long document's would take gigabytes."""

LORA_B_NOISE_STD = 1e-3
"""Standard deviation of the noise that stands in for B, whose zeros hide A's gradient."""


class CheckSkipped(Exception):
    """A proof cannot be tried here, which is neither a pass nor a failure; says why."""


class CheckResult(NamedTuple):
    """What a proof came to."""

    passed: bool
    figure: str
    bound: str


@dataclass(kw_only=True)
class CheckContext:
    """What the checks work on.

    Attributes:
        config: The preflight group.
        job: The training that is about to start; every method leaves its model as it was.
        documents: What the model is tried on: the small batch cut to a few hundred tokens, or the largest batch as it is.
        beside: What is packed to see whether documents stay isolated.
        rows: The first micro-batch as it was prepared; for ``full`` the largest one too.
        accumulated: Rows of which a step is made one by one and all at once.
        run: The run's folder, with the plan in it.
        folder: Scratch space, which the caller deletes.
        until: ``run.until``.
        trial: The run's own trainer; None where the caller has none.
        lesson: What overfitting one batch has shown; None before.
        token_seconds: Fastest gradient so far, in seconds per token.
    """

    config: PreflightConfig
    job: TrainingJob
    documents: list[Document]
    beside: list[Document]
    rows: list[dict[str, Any]]
    accumulated: list[dict[str, Any]]
    run: Path
    folder: Path
    until: str
    trial: TrialTrainer | None = None
    lesson: OverfitResult | None = None
    token_seconds: float | None = None

    @property
    def model(self) -> Any:
        """Returns the adapted model."""
        return self.job.trainable.model

    @property
    def tokenizer(self) -> Any:
        """Returns its tokenizer."""
        return self.job.trainable.tokenizer

    @property
    def data(self) -> PreparedData:
        """Returns the prepared data."""
        return self.job.data

    @property
    def quick(self) -> Fusion:
        """Returns how training steps are computed."""
        return self.job.trainable.fusion

    @property
    def spec(self) -> ModelSpec:
        """Returns the base and how it is loaded."""
        return self.job.trainable.spec

    @property
    def seed(self) -> int:
        """Returns the seed of dropout and of the noise on B."""
        return self.job.seed

    @property
    def autocast(self) -> torch.dtype:
        """Numbers of the computation."""
        numbers: torch.dtype = getattr(torch, self.spec.placement.dtype)
        return numbers

    @property
    def device(self) -> str:
        return str(self.model.device)

    @property
    def trainer(self) -> TrialTrainer:
        """The run's own trainer.

        Raises:
            CheckSkipped: There is none.
        """
        if self.trial is None:
            raise CheckSkipped("this caller brought no trainer to try")
        return self.trial

    @property
    def taught(self) -> OverfitResult:
        """What the repeated batch has shown.

        Raises:
            CheckSkipped: It did not come to its end.
        """
        if self.lesson is None:
            raise CheckSkipped("the steps on one repeated batch did not come to their end")
        return self.lesson

    @property
    def training_seconds(self) -> float | None:
        """Estimates the training's time from the fastest gradient here; None before there is one."""
        if self.trial is None or self.token_seconds is None:
            return None
        return self.trial.look[1] * self.token_seconds

    def apply_failure(self, failed: str) -> None:
        """Continues as training will after a check has failed."""
        if failed == "speed":
            self.quick.enabled = False
            self.__dict__.pop("nudged_gradients", None)
        if failed == "packing":
            self.job.trainable.packing = False
            if self.trial is not None:
                self.trial.__dict__.pop("look", None)

    def trained_tokens(self) -> int:
        return sum(len(learnt(document)) for document in self.documents)

    def loss(self) -> Tensor:
        """Summed loss of all documents in nats: as training takes it, or by plain steps while those are asked for."""
        if self.quick.loss_on_trained_tokens:
            with self._numbers() if self.quick.autocast else nullcontext():
                return self.quick.loss(self.model, self._flat(self.documents))
        return self._plain_losses(self._flat(self.documents)).sum()

    def token_losses(self, documents: list[Document], *, layout: str) -> Tensor:
        """Loss of every trained token as training takes it, in nats, shape (tokens,), in evaluation mode.

        Args:
            documents: In this order.
            layout: ``alone`` (a row each), ``packed`` (one row, positions restart) or ``one document`` (they do not).
        """
        self.model.eval()
        groups = [[document] for document in documents] if layout == "alone" else [documents]
        with torch.no_grad():
            return torch.cat([self._losses(self._flat(group, joined=layout == "one document")) for group in groups])

    def gradients(self) -> dict[str, Tensor]:
        """Gradient of the mean loss for every parameter that got one, by name, in training mode."""
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        started = time.monotonic()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            (self.loss() / self.trained_tokens()).backward()
        found = {name: p.grad.detach().clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        seconds = (time.monotonic() - started) / sum(len(document["input_ids"]) for document in self.documents)
        self.token_seconds = min(seconds, self.token_seconds or seconds)
        return found

    @cached_property
    def nudged_gradients(self) -> dict[str, Tensor]:
        """Gradients with B with_noisy_lora_b, as training computes them; several proofs start from them."""
        with self.with_noisy_lora_b():
            return self.gradients()

    def logits(self, *, adapter: bool) -> Tensor:
        """Last logits of the first document in evaluation mode by plain steps, shape (positions, vocabulary), float32."""
        self.model.eval()
        with self.quick.disabled(), nullcontext() if adapter else self.model.disable_adapter():
            return last_logits(self.model, self.documents[0]["input_ids"], numbers=self.autocast)

    def weights(self) -> list[Tensor]:
        """Some bytes of every frozen tensor: a repacked or requantized one shows there."""
        learnt = {p.data_ptr() for p in self.model.parameters() if p.requires_grad}
        flat = [one.reshape(-1).view(torch.uint8) for _, one in all_tensors(self.model) if one.data_ptr() not in learnt]
        return [one[:: max(1, len(one) // SAMPLES)].clone() for one in flat]

    @contextmanager
    def with_noisy_lora_b(self) -> Iterator[None]:
        """B filled with small noise, so that A gets a gradient too; as it was afterwards."""
        matrices = [p for name, p in self.model.named_parameters() if "lora_B" in name]
        before = [p.detach().clone() for p in matrices]
        generator = torch.Generator().manual_seed(self.seed)
        try:
            for p in matrices:
                p.data.copy_(torch.randn(p.shape, generator=generator) * LORA_B_NOISE_STD)
            yield
        finally:
            for p, old in zip(matrices, before, strict=True):
                p.data.copy_(old)

    def _flat(self, some: Sequence[Document], *, joined: bool = False) -> dict[str, Any]:
        """Documents end to end, as training lays them out; ``joined`` takes them for one."""
        lengths = [len(document["input_ids"]) for document in some]
        rows = [{**document, "seq_lengths": [length]} for document, length in zip(some, lengths, strict=True)]
        if joined:
            labels = [label for document in some for label in [IGNORED, *document["labels"][1:]]]
            ids = [token for document in some for token in document["input_ids"]]
            rows = [{"input_ids": ids, "labels": labels, "seq_lengths": [sum(lengths)]}]
        batch = Collator(flat=True, pad_token_id=0)(rows)
        del batch["padding"]
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _losses(self, inputs: dict[str, Any]) -> Tensor:
        if not self.quick.loss_on_trained_tokens:
            return self._plain_losses(inputs)
        with self._numbers() if self.quick.autocast else nullcontext():
            return self.quick.token_losses(self.model, inputs)

    def _plain_losses(self, inputs: dict[str, Any]) -> Tensor:
        labels = inputs.pop("labels")[:, 1:]
        causal = unwrap(self.model)
        with self._numbers():
            if (
                self.quick.choice.loss_on_trained_tokens
            ):  # then the head can be separated; logits of the others would take gigabytes
                hidden = causal.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, :-1]
                logits = causal.get_output_embeddings()(hidden[labels != IGNORED]).float()
            else:
                logits = self.model(**inputs, use_cache=False).logits[:, :-1][labels != IGNORED].float()
        return torch.nn.functional.cross_entropy(logits, labels[labels != IGNORED], reduction="none")

    def _numbers(self) -> torch.autocast:
        return autocast_to(self.device, self.autocast)


def autocast_to(device: str, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype != torch.float32)


def last_logits(model: Any, ids: Sequence[int], *, numbers: torch.dtype) -> Tensor:
    """Logits at the last positions of one document, shape (positions, vocabulary), float32."""
    kept = (
        {"logits_to_keep": LOGIT_POSITIONS}
        if "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters
        else {}
    )
    device = next(model.parameters()).device
    with torch.no_grad(), autocast_to(str(device), numbers):
        logits: Tensor = model(input_ids=torch.tensor([ids], device=device), use_cache=False, **kept).logits
    return logits[0, -LOGIT_POSITIONS:].float()
