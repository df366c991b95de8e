"""Entry functions of the package. They import numpy, pyarrow and tokenizers only when they are called."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.config import DataConfig
from finetune.products import PreparedData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.data.prove import ConversationProof


def prepare(config: DataConfig, *, folder: Path, tokenizer: "PreTrainedTokenizerBase", seed: int) -> PreparedData:
    """Reads, renders, tokenizes, masks, checks, splits and packs the rows, and logs its decisions.

    Args:
        folder: Receives ``train/``, ``heldout/``, ``ledger.parquet``, ``rendering.json``, ``lengths.json`` and
            ``preview.html``.
        tokenizer: A fast tokenizer. Its chat template becomes ``config.template`` where that is set.
        seed: Decides the split, the mix and the order of the packed rows.

    Returns:
        Their folder, and the counts.

    Raises:
        DataError: The user can fix it; the message names the place.
    """
    from finetune.data import pipeline

    return pipeline.prepare(config, folder=folder, tokenizer=tokenizer, seed=seed)


def explain(folder: Path, where: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Prints what happened to one input row, with its text, its trained spans and its token ids.

    Args:
        folder: A prepared folder.
        where: ``train.jsonl:137``, or the ledger's row number.

    Raises:
        DataError: The folder has no prepared data, or there is no such row.
    """
    from finetune.data.show.explain import explain_row

    sys.stdout.write(explain_row(folder, where, tokenizer) + "\n")


def prove(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> list["ConversationProof"]:
    """Compares, turn by turn, what would be trained with what serving sends and expects.

    Args:
        config: Its first rows are compared too, where they are files here.
        tokenizer: A fast tokenizer. Its chat template becomes ``config.template`` where that is set.

    Returns:
        One result for each conversation of a fixed set, and for each row.

    Raises:
        ConfigError: The template refuses ``data.system``.
        DataError: The template cannot be used for training, or a path matches nothing.
    """
    from finetune.data.proof_chats import first_rows, proof_chats
    from finetune.data.prove import prove_template

    own = dict(first_rows(config))
    proofs = prove_template(config, tokenizer, [*proof_chats(), *own.items()])
    return [replace(proof, is_row=proof.name in own) for proof in proofs]
