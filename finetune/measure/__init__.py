"""Teacher-forced and greedy measurements that every stage shares, in bounded memory.

Importing this room stays light; torch comes with the first name that is taken from it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.measure.chat import Chat, chat_of
    from finetune.measure.collate import Collator
    from finetune.measure.fidelity import Agreement, Reference, agreement, reference_logprobs
    from finetune.measure.fresh import FreshProcessError, answer, run_fresh
    from finetune.measure.generation import Answer, end_tokens, generate, generations
    from finetune.measure.graph import check_adapter, free, put_adapter, trained_graph
    from finetune.measure.logits import evaluating, unwrap
    from finetune.measure.losses import RowLoss, mean_loss, row_losses
    from finetune.measure.rows import batches, measured, open_rows, read_rows, trained_tokens

_HOMES = {
    "chat": ("Chat", "chat_of"),
    "collate": ("Collator",),
    "fidelity": ("Agreement", "Reference", "agreement", "reference_logprobs"),
    "fresh": ("FreshProcessError", "answer", "run_fresh"),
    "generation": ("Answer", "end_tokens", "generate", "generations"),
    "graph": ("check_adapter", "free", "put_adapter", "trained_graph"),
    "logits": ("evaluating", "unwrap"),
    "losses": ("RowLoss", "mean_loss", "row_losses"),
    "rows": ("batches", "measured", "open_rows", "read_rows", "trained_tokens"),
}

__all__ = [
    "Agreement",
    "Answer",
    "Chat",
    "Collator",
    "FreshProcessError",
    "Reference",
    "RowLoss",
    "agreement",
    "answer",
    "batches",
    "chat_of",
    "check_adapter",
    "end_tokens",
    "evaluating",
    "free",
    "generate",
    "generations",
    "mean_loss",
    "measured",
    "open_rows",
    "put_adapter",
    "read_rows",
    "reference_logprobs",
    "row_losses",
    "run_fresh",
    "trained_graph",
    "trained_tokens",
    "unwrap",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"finetune.measure.{module}"), name)
    raise AttributeError(f"module 'finetune.measure' has no attribute {name!r}")
