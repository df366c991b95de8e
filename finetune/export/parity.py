"""Checks an export against its model: token ids of chats, logits of prompts, loss, and an answer that ends."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.inference.bootstrap import RESAMPLES, Bootstrap, Ratio
from finetune.scores import Parity, RoundingCost

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.inference.chat import Chat
    from finetune.inference.losses import RowLoss

POSITIONS = 8
"""Positions compared at the end of each prompt, where an answer begins; few, so that the file stays small."""

REFERENCE_CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is 3 + 33 + 333 + 3333?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is water wet?"}],
    [
        {"role": "user", "content": "Say a number."},
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "  Say it again,\n\n\tlouder.  "},
    ],
    [{"role": "user", "content": 'Ünïcode – 你好 🙂 – and {"json": [1, 2.5, null]}, plus `code()` & <html>.'}],
]
"""Turns, a system message, white space, and text that tokenizers treat in many ways."""


@dataclass(frozen=True)
class Expected:
    """Outputs of the model, which its export must reproduce.

    Attributes:
        chats: Reference chats that its template can write.
        chat_tokens: Their token ids, generation prompt included.
        prompts: Token ids of every compared prompt: the chats, then held-out ones.
        logits: Per prompt, float32, shape (up to 8 last positions, vocabulary).
        rows: Held-out rows that the loss is computed on, ``input_ids`` and ``labels`` each.
        losses: Of these rows, ``[nats, trained tokens]`` each.
        stopped: Whether the greedy answer to the last prompt ended within the limit.
        ending: The last prompt and that answer, without its end token. An export with the same end tokens ends here
            too. From the prompt alone, an export whose rounding changes one near tie could write another answer and end
            elsewhere.
        dtype: That the model computes in.
    """

    chats: list[list[dict[str, str]]]
    chat_tokens: list[list[int]]
    prompts: list[list[int]]
    logits: list[np.ndarray]
    rows: list[dict[str, list[int]]]
    losses: list[list[float]]
    stopped: bool
    ending: list[int]
    dtype: str


def expected(
    model: PreTrainedModel,
    chat: Chat,
    *,
    heldout: Sequence[Sequence[int]],
    scored: list[dict[str, list[int]]],
    losses: Sequence[RowLoss],
    max_new_tokens: int,
) -> Expected:
    """Runs the model in this process.

    Args:
        model: The adapted model, or the merged model.
        chat: Its tokenizer and end tokens.
        heldout: Held-out prompts.
        scored: Held-out rows that the losses belong to.
        losses: The model's losses on these rows.
        max_new_tokens: Limit of the answer.
    """
    from finetune.inference.generation import generate

    chats = [messages for messages in REFERENCE_CHATS if _can_render(chat.tokenizer, messages)]
    tokens = [chat_tokens(chat.tokenizer, messages) for messages in chats]
    prompts = [*tokens, *[list(prompt) for prompt in heldout]]
    if not prompts:
        raise ExportError(
            "there is nothing to compare an export on: the template writes none of the reference prompts, and "
            "logit_rows=0 takes no held-out prompt; set logit_rows"
        )
    last, limit = prompts[-1], max_new_tokens
    (answer,) = generate(model, chat.tokenizer, [last], max_new_tokens=limit, batch_rows=1, ends=chat.ends)
    return Expected(
        chats=chats,
        chat_tokens=tokens,
        prompts=prompts,
        logits=[last_logits(model, prompt) for prompt in prompts],
        rows=scored,
        losses=loss_pairs(losses),
        stopped=answer.stopped,
        ending=[*last, *(answer.tokens if answer.stopped else [])],
        dtype=str(model.dtype).removeprefix("torch."),
    )


def loss_pairs(losses: Sequence[RowLoss]) -> list[list[float]]:
    """Returns ``[nats, trained tokens]`` of each row."""
    return [[row.loss, row.tokens] for row in losses]


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Returns the token ids of a chat with its generation prompt."""
    encoding: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoding["input_ids"])


def last_logits(model: PreTrainedModel, prompt: Sequence[int]) -> np.ndarray:
    """Returns float32 logits at the last positions, shape (up to 8, vocabulary), from a plain forward pass."""
    import torch

    from finetune.inference.logits import input_device

    ids = torch.tensor([list(prompt)], device=input_device(model))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    array: np.ndarray = logits[0, -POSITIONS:].float().cpu().numpy()
    return array


def save_logits(file: Path, logits: Sequence[np.ndarray]) -> None:
    """Writes the logits of each prompt, one array ``prompt_<n>`` each."""
    np.savez(file, **{f"prompt_{index}": array for index, array in enumerate(logits)})  # type: ignore[arg-type]


def package_versions(packages: Sequence[str]) -> str:
    """Returns names and installed versions, separated by commas."""
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def _can_render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> bool:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return False
    try:
        chat_tokens(tokenizer, messages)
    except TemplateError:  # some templates refuse a system message
        return False
    return True


def compare(
    name: str, wanted: Expected, got: dict[str, Any], logits: Path, *, config: ExportConfig, seed: int
) -> Parity:
    """Compares the outputs of the export's own runtime with those of the model.

    Args:
        name: The export's, for messages.
        wanted: From the model.
        got: ``chat_tokens``, ``losses``, ``stopped`` and ``runtime`` from the other process.
        logits: File of its logits, see `save_logits`.
        config: The bounds.
        seed: Of the bootstrap.

    Raises:
        ExportError: Token ids differ, a bound is exceeded, or the answer does not end.
    """
    _check_tokens(name, wanted, got["chat_tokens"])
    with np.load(logits) as arrays:
        pairs = [(array, arrays[f"prompt_{index}"]) for index, array in enumerate(wanted.logits)]
    difference, kl, top1 = _distances(pairs)
    parity = Parity(
        passed=True,
        runtime=got["runtime"],
        chats=len(wanted.chats),
        prompts=len(wanted.prompts),
        max_logit_difference=round(difference, 6),
        bound=config.max_logit_difference,
        kl=round(kl, 8),
        top1_agreement=round(top1, 4),
        stops=bool(got["stopped"]),
        rows=len(wanted.rows),
    )
    if wanted.rows:
        parity = _with_losses(parity, wanted.losses, got["losses"], seed=seed)
    if not difference <= config.max_logit_difference or not kl <= config.max_kl:
        raise ExportError(
            f"export.{name} differs from the model that it was made from: logits by up to {difference:.4f} (bound "
            f"export.{name}.max_logit_difference={config.max_logit_difference}), KL {kl:.6f} (bound {config.max_kl}), "
            f"over {len(wanted.prompts)} prompts in {got['runtime']}; it is discarded"
        )
    if wanted.stopped and not got["stopped"]:
        raise ExportError(
            f"export.{name}, after the model's own answer, writes {config.max_new_tokens} more tokens where the model "
            "ends: its end tokens are lost"
        )
    return parity


def rounding_cost(
    name: str, *, merged: Expected, export: Expected, config: ExportConfig, scratch: Path, seed: int
) -> RoundingCost:
    """Measures what fewer bits cost. There is no bound: the user decides.

    Args:
        name: The export's.
        merged: Outputs of the merged model.
        export: Outputs of the same weights in the export's dtype.
        config: Its settings.
        scratch: Folder of a temporary file of logits.
        seed: Of the interval.
    """
    file = scratch / "cost.npz"
    save_logits(file, export.logits)
    got = {"chat_tokens": merged.chat_tokens, "losses": export.losses, "stopped": merged.stopped, "runtime": ""}
    unbounded = dataclasses.replace(config, max_logit_difference=math.inf, max_kl=math.inf)
    parity = compare(name, merged, got, file, config=unbounded, seed=seed)
    file.unlink()
    return RoundingCost(
        kl=parity.kl,
        top1_agreement=parity.top1_agreement,
        rows=parity.rows,
        loss=parity.loss,
        model_loss=parity.model_loss,
        loss_difference=parity.loss_difference,
        note=_cost_text(parity),
    )


def _cost_text(parity: Parity) -> str:
    text = (
        f"compared with the merged model before rounding: KL {parity.kl:.4f}, "
        f"top-1 agreement {parity.top1_agreement:.3f}"
    )
    if parity.loss_difference is None:
        return text
    losses = f"held-out loss {parity.loss:.4f} (merged model {parity.model_loss:.4f})"
    return f"{text}, {losses}, {parity.loss_difference.text()}"


def _check_tokens(name: str, wanted: Expected, tokens: list[list[int]]) -> None:
    for chat, got, trained in zip(wanted.chats, tokens, wanted.chat_tokens, strict=True):
        if got != trained:
            raise ExportError(
                f"export.{name}: its tokenizer writes the chat {chat} as {len(got)} tokens and training "
                f"wrote {len(trained)}: {got[:20]}... for {trained[:20]}..."
            )


def _with_losses(parity: Parity, before: list[list[float]], after: list[list[float]], *, seed: int) -> Parity:
    """Adds the held-out loss of the export and of its model, and the difference with its interval, paired by row."""
    model, export = (Ratio(totals=np.array(side)[:, 0], weights=np.array(side)[:, 1]) for side in (before, after))
    bootstrap = Bootstrap(len(before), samples=RESAMPLES, seed=seed)
    change = bootstrap.difference(model, export)
    return dataclasses.replace(parity, **vars(bootstrap.loss(export)), model_loss=model.value, loss_difference=change)


def _distances(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Returns the largest logit difference, mean KL(first || second), and the share of equal top tokens."""
    difference, divergence, agreeing, positions = 0.0, 0.0, 0, 0
    for wanted, got in pairs:
        shared = min(wanted.shape[1], got.shape[1])
        model, export = wanted[:, :shared].astype(np.float64), got[:, :shared].astype(np.float64)
        difference = max(difference, float(np.abs(model - export).max()))
        p, q = log_softmax(model), log_softmax(export)
        divergence += float((np.exp(p) * (p - q)).sum())
        agreeing += int((model.argmax(1) == export.argmax(1)).sum())
        positions += len(model)
    return difference, max(divergence / positions, 0.0), agreeing / positions


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns log-probabilities over the last axis, in float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
