"""What the proofs work on: the adapted model and its first rows, with ways to take a loss, gradients and logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from datasets import load_from_disk

from finetune.measure import Collator

if TYPE_CHECKING:
    from finetune.data import PreparedData
    from finetune.hardware import Placement
    from finetune.speed import Quick

MOST_TOKENS = 640
"""Tokens of the batch at most, if it is more than one document: plain gradients take more memory than training does."""

SAMPLED_BYTES = 4096
NUDGE = 1e-3
"""Standard deviation of the noise that stands in for B, whose zeros hide A's gradient."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A workbench for the proofs.

    Attributes:
        model: The adapted model; every method leaves it as it was.
        tokenizer: Its tokenizer.
        documents: First training documents, ``input_ids`` and ``labels`` each, cut out of their packs.
        quick: How steps are computed.
        step0_bound: How far the fresh adapter may move logits, in their standard deviations; None where it means to.
        autocast: Numbers of the computation.
        seed: Seeds dropout and the nudge.
    """

    model: Any
    tokenizer: Any
    documents: list[dict[str, list[int]]]
    quick: Quick
    step0_bound: float | None
    device: str
    autocast: torch.dtype
    seed: int

    @classmethod
    def build(
        cls,
        model: Any,
        *,
        tokenizer: Any,
        data: PreparedData,
        placement: Placement,
        quick: Quick,
        rows: int,
        step0_bound: float | None,
        seed: int,
    ) -> Bench:
        documents: list[dict[str, list[int]]] = []
        for pack in load_from_disk(str(data.folder / "train")):
            start = 0
            for length in pack["seq_lengths"]:
                documents.append({key: pack[key][start : start + length] for key in ("input_ids", "labels")})
                start += length
            if len(documents) >= rows:
                break
        sizes = list(accumulate(len(row["input_ids"]) for row in documents[:rows]))
        rows = max(1, sum(size <= MOST_TOKENS for size in sizes))
        return cls(
            model=model, tokenizer=tokenizer, documents=documents[:rows], quick=quick, step0_bound=step0_bound, device=str(model.device),
            autocast=getattr(torch, placement.dtype), seed=seed,
        )  # fmt: skip

    def trained_text(self) -> list[str]:
        """What each document teaches, decoded from its labels."""
        return [self.tokenizer.decode([token for token in row["labels"] if token != -100]) for row in self.documents]

    def trained_tokens(self) -> int:
        return sum(label != -100 for row in self.documents for label in row["labels"][1:])

    def loss(self) -> torch.Tensor:
        """Summed loss of all documents in nats: as training takes it, or by plain steps while those are asked for."""
        if self.quick.trained_only:
            with self._numbers() if self.quick.autocast else nullcontext():
                return self.quick.loss(self.model, self._flat(self.documents))
        if self.quick.choice.trained_only:  # then the head can be separated; logits of the others would take gigabytes
            return self._plain_loss(self._flat(self.documents))
        losses = []
        for row in self.documents:
            ids, labels = (torch.tensor([row[key]], device=self.device) for key in ("input_ids", "labels"))
            logits = self._forward(ids)[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum"))
        return torch.stack(losses).sum()

    def _plain_loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        labels = inputs.pop("labels")[:, 1:]
        causal = self.model.get_base_model()
        with self._numbers():
            hidden = causal.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, :-1]
            logits = causal.get_output_embeddings()(hidden[labels != -100]).float()
        return torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum")

    def trained_logprobs(self, *, layout: str) -> torch.Tensor:
        """Log-probability of every trained token, shape (tokens,), in evaluation mode.

        Args:
            layout: ``alone`` (a row each), ``packed`` (one row, positions restart) or ``one document`` (they do not).
        """
        self.model.eval()
        found = []
        with torch.no_grad():
            for rows in [[row] for row in self.documents] if layout == "alone" else [self.documents]:
                inputs = self._flat(rows)
                ids, labels = inputs.pop("input_ids"), inputs.pop("labels")[0]
                if layout == "one document":
                    inputs = {"position_ids": torch.arange(ids.shape[1], device=self.device)[None]}
                scores = self._forward(ids, **inputs)[0, :-1].float().log_softmax(-1)
                trained = (labels[1:] != -100).nonzero()[:, 0]
                found.append(scores[trained, labels[1:][trained]])
        return torch.cat(found)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradient of the mean loss for every parameter that got one, by name, in training mode."""
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            (self.loss() / self.trained_tokens()).backward()
        found = {name: p.grad.detach().clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found

    def logits(self, *, adapter: bool) -> torch.Tensor:
        """Logits of the first document in evaluation mode by plain steps, shape (T, vocabulary), float32."""
        self.model.eval()
        ids = torch.tensor([self.documents[0]["input_ids"]], device=self.device)
        with torch.no_grad(), self.quick.off():
            if adapter:
                return self._forward(ids)[0].float()
            with self.model.disable_adapter():
                return self._forward(ids)[0].float()

    def weights(self) -> list[torch.Tensor]:
        """The first bytes of every frozen parameter: a repacked one shows there."""
        frozen = (p for p in self.model.parameters() if not p.requires_grad)
        return [p.detach().reshape(-1).view(torch.uint8)[:SAMPLED_BYTES].clone() for p in frozen]

    @contextmanager
    def nudged(self) -> Iterator[None]:
        """B filled with small noise, so that A gets a gradient too; zero again afterwards."""
        matrices = [(name, p) for name, p in self.model.named_parameters() if "lora_B" in name]
        before = [p.detach().clone() for _, p in matrices]
        generator = torch.Generator().manual_seed(self.seed)
        try:
            for _, p in matrices:
                p.data.copy_(torch.randn(p.shape, generator=generator) * NUDGE)
            yield
        finally:
            for (_, p), old in zip(matrices, before, strict=True):
                p.data.copy_(old)

    def _flat(self, documents: list[dict[str, list[int]]]) -> dict[str, Any]:
        """Documents end to end, as training lays them out."""
        rows = [{**row, "seq_lengths": [len(row["input_ids"])]} for row in documents]
        batch = Collator(flat=True, pad_token_id=0)(rows)
        del batch["padding"]
        return {name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

    def _forward(self, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        with self._numbers():
            return self.model(input_ids=ids, use_cache=False, **inputs).logits

    def _numbers(self) -> torch.autocast:
        return torch.autocast(self.device.split(":")[0], dtype=self.autocast, enabled=self.autocast != torch.float32)
