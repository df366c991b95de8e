"""What the checks work on: the adapted model and its documents, with their losses, gradients and logits."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.inference.collate import Collator
from finetune.inference.generation import end_tokens
from finetune.inference.logits import unwrap
from finetune.inference.rows import IGNORED
from finetune.preflight.batch import CheckRows, Document, trained_tokens
from finetune.preflight.trial import LOSS_SCALE, TrialTrainer, without_dropout
from finetune.quantization.backends import all_tensors

if TYPE_CHECKING:
    from finetune.kernels import Fusion
    from finetune.model import ModelSpec
    from finetune.preflight.config import PreflightConfig
    from finetune.preflight.overfit import OverfitResult
    from finetune.preflight.rollout import RolloutProbe
    from finetune.products import PreparedData
    from finetune.trainable import TrainingJob

SAMPLES = 4096
"""Bytes of a frozen weight that are compared, evenly spaced."""

LOGIT_POSITIONS = 64
"""Last positions, whose logits are compared: those of a whole long document would take gigabytes."""

LORA_B_NOISE_STD = 1e-3
"""Of the noise that stands in for B, whose zeros hide A's gradient."""


class CheckSkipped(Exception):
    """A check cannot run here, which is neither a pass nor a failure; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The outcome of one check.

    Attributes:
        passed: Whether the figure is within the bound.
        figure: What was measured.
        bound: What is allowed.
    """

    passed: bool
    figure: str
    bound: str


@dataclass(kw_only=True)
class CheckContext:
    """What the checks work on; every method leaves the model as it was.

    Attributes:
        config: The preflight group.
        job: The training that is about to start.
        rows: The rows and documents that the checks run on.
        run: The run's folder, with the plan in it.
        folder: Scratch space, which the caller deletes.
        until: ``run.until``.
        trial: The run's own trainer; None where the caller has none.
        overfit_result: What overfitting one batch has shown; None before.
        rollout: What sampling has shown, for objectives that sample answers; None before.
        token_seconds: Fastest gradient so far, in seconds per token.
    """

    config: PreflightConfig
    job: TrainingJob
    rows: CheckRows
    run: Path
    folder: Path
    until: str
    trial: TrialTrainer | None = None
    overfit_result: OverfitResult | None = None
    rollout: RolloutProbe | None = None
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
    def fusion(self) -> Fusion:
        """Returns the fused layers and kernels of the model."""
        return self.job.trainable.fusion

    @property
    def spec(self) -> ModelSpec:
        """Returns the base."""
        return self.job.trainable.spec

    @property
    def seed(self) -> int:
        """Returns the seed of dropout and of the noise on B."""
        return self.job.seed

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the computation."""
        dtype: torch.dtype = getattr(torch, self.spec.placement.dtype)
        return dtype

    @property
    def device(self) -> str:
        """Returns the device of the model, e.g. ``cuda:0``."""
        return str(self.model.device)

    @property
    def trainer(self) -> TrialTrainer:
        """Returns the run's own trainer.

        Raises:
            CheckSkipped: The caller has none.
        """
        if self.trial is None:
            raise CheckSkipped("the caller has no trainer")
        return self.trial

    @property
    def overfit(self) -> OverfitResult:
        """Returns what overfitting one batch has shown; raises `CheckSkipped` where it did not finish."""
        if self.overfit_result is None:
            raise CheckSkipped("the steps on one repeated batch did not finish")
        return self.overfit_result

    @property
    def training_seconds(self) -> float | None:
        """Returns an estimate of the training's time from the fastest gradient here; None before the first."""
        if self.trial is None or self.token_seconds is None:
            return None
        return self.trial.upcoming.tokens * self.token_seconds

    @cached_property
    def end_tokens(self) -> set[int]:
        """Returns the tokens that end an answer: those of tokenizer and generation config, and the template's."""
        file = self.data.folder / "rendering.json"
        rendering = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        turn = rendering.get("end_of_turn_id")
        return {*end_tokens(self.model, self.tokenizer), *([] if turn is None else [turn])}

    def apply_failure(self, name: str) -> None:
        """Computes the following checks as training will after the check ``name`` has failed."""
        if name in ("fused_layers", "packing"):
            self.__dict__.pop("noisy_gradients", None)
        if name == "fused_layers":
            self.fusion.enabled = False
        if name == "packing":
            self.job.trainable.packing = False
            if self.trial is not None:
                self.trial.__dict__.pop("upcoming", None)

    def trained_tokens(self) -> int:
        """Counts the tokens that the documents train on."""
        return sum(len(trained_tokens(document)) for document in self.rows.documents)

    def loss(self) -> Tensor:
        """Computes the summed loss of all documents in nats as training does; see also ``fusion.disabled``."""
        if self.fusion.loss_on_trained_tokens:
            with self._autocast() if self.fusion.autocast else nullcontext():
                return self.fusion.loss(self.model, self._collate(self.rows.documents))
        return self._plain_losses(self._collate(self.rows.documents)).sum()

    def token_losses(self, documents: list[Document], *, layout: str) -> Tensor:
        """Computes the loss of every trained token as training does, in nats, shape (tokens,), in evaluation mode.

        Args:
            documents: The documents, whose order is kept.
            layout: ``alone`` (a row each), ``packed`` (one row, positions restart) or ``one document`` (they do not).
        """
        self.model.eval()
        groups = [[document] for document in documents] if layout == "alone" else [documents]
        with torch.no_grad():
            return torch.cat([self._losses(self._collate(group, joined=layout == "one document")) for group in groups])

    def gradients(self) -> dict[str, Tensor]:
        """Computes the gradient of the mean loss by name, in training mode without dropout, where there is one.

        It is returned in host memory, so that the device never holds more than one, as in training.
        """
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        started, scale = time.monotonic(), LOSS_SCALE if self.dtype == torch.float16 else 1.0
        with torch.random.fork_rng(devices=[]), without_dropout(self.model):
            torch.manual_seed(self.seed)
            (self.loss() * scale / self.trained_tokens()).backward()
        gradients = {n: p.grad.to("cpu").div_(scale) for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        seconds = (time.monotonic() - started) / sum(len(document["input_ids"]) for document in self.rows.documents)
        self.token_seconds = min(seconds, self.token_seconds or seconds)
        return gradients

    @cached_property
    def noisy_gradients(self) -> dict[str, Tensor]:
        """Returns the gradients with noise in B, as training computes them; several checks start from them."""
        with self.with_noisy_lora_b():
            return self.gradients()

    def logits(self, *, adapter: bool) -> Tensor:
        """Computes the last logits of the first document in evaluation mode with the original layers.

        Returns:
            Logits, shape (positions, vocabulary), float32.
        """
        self.model.eval()
        with self.fusion.disabled(), nullcontext() if adapter else self.model.disable_adapter():
            return last_logits(self.model, self.rows.documents[0]["input_ids"], dtype=self.dtype)

    def frozen_samples(self) -> list[Tensor]:
        """Copies some bytes of every frozen tensor: they change where a weight is repacked or quantized again."""
        trained = {p.data_ptr() for p in self.model.parameters() if p.requires_grad}
        frozen = [tensor for _, tensor in all_tensors(self.model) if tensor.data_ptr() not in trained]
        flat = [tensor.reshape(-1).view(torch.uint8) for tensor in frozen]
        return [data[:: max(1, len(data) // SAMPLES)].clone() for data in flat]

    @contextmanager
    def with_noisy_lora_b(self) -> Iterator[None]:
        """Fills B with small noise while the context is open, so that A gets a gradient too."""
        matrices = [p for name, p in self.model.named_parameters() if "lora_B" in name]
        before = [p.detach().to("cpu", copy=True) for p in matrices]
        generator = torch.Generator().manual_seed(self.seed)
        try:
            for p in matrices:
                p.data.copy_(torch.randn(p.shape, generator=generator) * LORA_B_NOISE_STD)
            yield
        finally:
            for p, old in zip(matrices, before, strict=True):
                p.data.copy_(old)

    def _collate(self, documents: Sequence[Document], *, joined: bool = False) -> dict[str, Any]:
        """Lays documents in one row or a row each, as training does; ``joined`` makes a single document of them."""
        lengths = [len(document["input_ids"]) for document in documents]
        rows = [{**document, "seq_lengths": [length]} for document, length in zip(documents, lengths, strict=True)]
        if joined:
            labels = [label for document in documents for label in [IGNORED, *document["labels"][1:]]]
            ids = [token for document in documents for token in document["input_ids"]]
            rows = [{"input_ids": ids, "labels": labels, "seq_lengths": [sum(lengths)]}]
        batch = Collator(flat=self.job.trainable.packing, pad_token_id=0)(rows)
        del batch["padding"]
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _losses(self, inputs: dict[str, Any]) -> Tensor:
        if not self.fusion.loss_on_trained_tokens:
            return self._plain_losses(inputs)
        with self._autocast() if self.fusion.autocast else nullcontext():
            return self.fusion.token_losses(self.model, inputs)

    def _plain_losses(self, inputs: dict[str, Any]) -> Tensor:
        labels = inputs.pop("labels")[:, 1:]
        causal = unwrap(self.model)
        with self._autocast():
            if self.fusion.choice.loss_on_trained_tokens:  # the head can be separated, which saves gigabytes of logits
                hidden = causal.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, :-1]
                logits = causal.get_output_embeddings()(hidden[labels != IGNORED]).float()
            else:
                logits = self.model(**inputs, use_cache=False).logits[:, :-1][labels != IGNORED].float()
        return torch.nn.functional.cross_entropy(logits, labels[labels != IGNORED], reduction="none")

    def _autocast(self) -> torch.autocast:
        return autocast_to(self.device, self.dtype)


def autocast_to(device: str, dtype: torch.dtype) -> torch.autocast:
    """Returns the autocast context of a device; it is off for float32."""
    return torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype != torch.float32)


def last_logits(model: Any, ids: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """Computes the logits at the last positions of one document, shape (positions, vocabulary), float32."""
    parameters = inspect.signature(unwrap(model).forward).parameters
    limit = {"logits_to_keep": LOGIT_POSITIONS} if "logits_to_keep" in parameters else {}
    device = next(model.parameters()).device
    with torch.no_grad(), autocast_to(str(device), dtype):
        logits: Tensor = model(input_ids=torch.tensor([ids], device=device), use_cache=False, **limit).logits
    return logits[0, -LOGIT_POSITIONS:].float()
