"""Is the export the model? The same chats as token ids, the same prompts as logits, and an answer that ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.inference.bootstrap import RESAMPLES, Bootstrap, Ratio

if TYPE_CHECKING:
    from finetune.inference.chat import Chat
    from finetune.inference.losses import RowLoss

POSITIONS = 8
"""Compared at the end of each prompt: there the next token is an answer's, and a file of logits stays small."""

GOLDEN_CHATS: list[list[dict[str, str]]] = [
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
    """What the model itself gives.

    Attributes:
        chats: Golden chats that its template can write.
        chat_tokens: Their token ids, generation prompt included.
        prompts: Token ids of every compared prompt: the chats, then held-out ones.
        logits: Per prompt, float32, shape (up to 8 last positions, vocabulary).
        rows: Held-out rows that the loss is taken on, ``input_ids`` and ``labels`` each.
        losses: Of these rows, ``[nats, trained tokens]`` each.
        stopped: Whether the greedy answer to the last prompt ended within the limit.
        ending: The last prompt and that answer, up to where it ended: what reads the end as the model does ends here too. Left
            to itself, an export whose rounding turns one near tie would write, and perhaps end, something else.
    """

    chats: list[list[dict[str, str]]]
    chat_tokens: list[list[int]]
    prompts: list[list[int]]
    logits: list[np.ndarray]
    rows: list[dict[str, list[int]]]
    losses: list[list[float]]
    stopped: bool
    ending: list[int]


def expected(
    model: Any,
    chat: Chat,
    *,
    heldout: Sequence[Sequence[int]],
    scored: list[dict[str, list[int]]],
    losses: Sequence[RowLoss],
    max_new_tokens: int,
) -> Expected:
    """Asks the model in this process.

    Args:
        model: The trained graph, or the merged model.
        chat: Its tokenizer and end tokens.
        heldout: Held-out prompts.
        scored: Held-out rows to take the loss on.
        losses: The model's on these.
        max_new_tokens: Limit of the answer.
    """
    from finetune.inference.generation import generate

    chats = [messages for messages in GOLDEN_CHATS if _writes(chat.tokenizer, messages)]
    tokens = [chat_tokens(chat.tokenizer, messages) for messages in chats]
    prompts = [*tokens, *[list(prompt) for prompt in heldout]]
    if not prompts:
        raise ExportError(
            "there is nothing to compare an export on: no golden chat can be written and no held-out prompt is asked for"
        )
    answer = generate(model, chat.tokenizer, prompts[-1:], max_new_tokens=max_new_tokens, batch_rows=1, ends=chat.ends)[
        0
    ]
    logits = [last_logits(model, prompt) for prompt in prompts]
    return Expected(
        chats=chats, chat_tokens=tokens, prompts=prompts, logits=logits, rows=scored, losses=pairs(losses), stopped=answer.stopped,
        ending=[*prompts[-1], *(answer.tokens if answer.stopped else [])],
    )  # fmt: skip


def pairs(losses: Sequence[RowLoss]) -> list[list[float]]:
    """``[nats, trained tokens]`` of each row."""
    return [[one.loss, one.tokens] for one in losses]


def chat_tokens(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a chat, ready for an answer."""
    tokens: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    return list(tokens)


def last_logits(model: Any, prompt: Sequence[int]) -> np.ndarray:
    """float32 logits at the last positions, shape (up to 8, vocabulary), by the model's plain forward pass."""
    import torch

    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    found: np.ndarray = logits[0, -POSITIONS:].float().cpu().numpy()
    return found


def _writes(tokenizer: Any, messages: list[dict[str, str]]) -> bool:
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
) -> dict[str, Any]:
    """Holds what the export's own runtime gave against what the model gives.

    Args:
        name: The export's, for messages.
        wanted: From the model.
        got: ``chat_tokens``, ``losses``, ``stopped`` and ``runtime`` from the other process.
        logits: Its logits, one array ``prompt_<n>`` each.
        config: The bounds.
        seed: Of the bootstrap.

    Returns:
        ``{"passed", "runtime", "chats", "prompts", "max_logit_difference", "kl", "top1_agreement", "stops", "rows", "loss",
        "loss_low", "loss_high", "perplexity", "tokens", "model_loss", "loss_difference": {"difference", "low", "high"}}``; those
        from ``loss`` on where ``rows``, which it was taken on, is not 0.

    Raises:
        ExportError: Token ids differ, a bound is broken, or the answer does not end.
    """
    if got["chat_tokens"] != wanted.chat_tokens:
        number = next(
            n for n, (one, other) in enumerate(zip(got["chat_tokens"], wanted.chat_tokens, strict=True)) if one != other
        )
        raise ExportError(
            f"export.{name}: its tokenizer writes the chat {wanted.chats[number]} as {len(got['chat_tokens'][number])} tokens and training "
            f"wrote {len(wanted.chat_tokens[number])}: {got['chat_tokens'][number][:20]}... for {wanted.chat_tokens[number][:20]}..."
        )
    with np.load(logits) as arrays:
        both = [(want, arrays[f"prompt_{number}"]) for number, want in enumerate(wanted.logits)]
    difference, kl, top1 = _distances(both)
    found = {
        "passed": True,
        "runtime": got["runtime"],
        "chats": len(wanted.chats),
        "prompts": len(wanted.prompts),
        "max_logit_difference": round(difference, 6),
        "bound": config.max_logit_difference,
        "kl": round(kl, 8),
        "top1_agreement": round(top1, 4),
        "stops": bool(got["stopped"]),
        "rows": len(wanted.rows),
        **(_loss_change(wanted.losses, got["losses"], seed=seed) if wanted.rows else {}),
    }
    if not difference <= config.max_logit_difference or not kl <= config.max_kl:
        raise ExportError(
            f"export.{name} differs from the model that it was made from: logits by up to {difference:.4f} (bound "
            f"export.{name}.max_logit_difference={config.max_logit_difference}), KL {kl:.6f} (bound {config.max_kl}), over "
            f"{len(wanted.prompts)} prompts in {got['runtime']}; it is not kept"
        )
    if wanted.stopped and not got["stopped"]:
        raise ExportError(
            f"export.{name}, behind the model's own answer, writes {config.max_new_tokens} more tokens where the model ends: "
            "its end tokens are lost"
        )
    return found


def _loss_change(before: list[list[float]], after: list[list[float]], *, seed: int) -> dict[str, Any]:
    """Held-out loss of the export and of its model, and the difference with its interval, paired by row."""
    one, other = (Ratio(totals=np.array(side)[:, 0], weights=np.array(side)[:, 1]) for side in (before, after))
    draw = Bootstrap(len(before), samples=RESAMPLES, seed=seed)
    return {**draw.loss(other), "model_loss": one.value, "loss_difference": draw.difference(one, other).change}


def _distances(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Largest difference of a logit, mean KL(first || second), share of positions with the same first token."""
    difference, divergence, same, positions = 0.0, 0.0, 0, 0
    for want, got in pairs:
        shared = min(want.shape[1], got.shape[1])
        one, other = want[:, :shared].astype(np.float64), got[:, :shared].astype(np.float64)
        difference = max(difference, float(np.abs(one - other).max()))
        p, q = _log_softmax(one), _log_softmax(other)
        divergence += float((np.exp(p) * (p - q)).sum())
        same += int((one.argmax(1) == other.argmax(1)).sum())
        positions += len(want)
    return difference, max(divergence / positions, 0.0), same / positions


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
