"""Commands that compare what is trained with what is served: ``data --prove-template``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.cli.command import Invocation
from finetune.config import load
from finetune.console import log, table
from finetune.errors import EXIT_OK, EXIT_USAGE

if TYPE_CHECKING:
    from finetune.data.prove import ConversationProof


def prove_template(invocation: Invocation) -> int:
    """Prints one line for each conversation: ``data --prove-template model=qwen3_8b``."""
    proofs = _proofs(invocation)
    return _show(proofs)


def prove_turns(invocation: Invocation) -> int:
    """Prints the text of every turn as well: ``data --prove-turns model=qwen3_8b``."""
    proofs = _proofs(invocation)
    for proof in proofs:
        for turn in proof.turns:
            log("data", f"{proof.name}, message {turn.message}, row {turn.row}: {turn.problem or 'PASS'}")
            log("served", repr(turn.served))
            log("trained", repr(turn.trained))
    return _show(proofs)


def _proofs(invocation: Invocation) -> list[ConversationProof]:
    from finetune.data import prove
    from finetune.model.base import find
    from finetune.model.load import load_tokenizer

    config = load(invocation.overrides)
    tokenizer = load_tokenizer(
        find(config.model), trust_remote_code=config.model.trust_remote_code, template=config.model.template
    )
    return prove(config.data, tokenizer)


def _show(proofs: list[ConversationProof]) -> int:
    """Prints the table, then each conversation that is not trained on, and what a template does to others.

    Returns:
        2 where a turn differs, a row of the data is refused, or no conversation can be trained on; else 0.
    """
    table(
        "data",
        ("conversation", "turns", "rows", "result"),
        [(proof.name, str(len(proof.turns)), str(proof.rows), proof.verdict.partition(":")[0]) for proof in proofs],
    )
    for proof in proofs:
        if proof.verdict != "PASS":
            log("data", f"{proof.name}: {proof.verdict}")
        elif proof.notes:
            log("data", f"{proof.name}: {', '.join(proof.notes)}")
    failed = any(proof.differs or (proof.is_row and proof.refused) for proof in proofs)
    failed |= all(proof.refused for proof in proofs)
    return EXIT_USAGE if failed else EXIT_OK
