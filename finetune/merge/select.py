"""Which candidate is kept: two questions, 'is it better?' and 'is it what I trained?', and one rule."""

from collections.abc import Sequence
from typing import Any

from finetune.console import change_text, human_bytes
from finetune.errors import MergeError
from finetune.merge.config import MergeConfig


def choose(
    figures: Sequence[dict[str, Any]], *, config: MergeConfig, trained_loss: float
) -> tuple[dict[str, Any], str]:
    """Picks a candidate by ``merge.choose`` and says why.

    Args:
        figures: ``name``, ``kl`` and ``loss`` of each candidate.
        config: The rule and its bound.
        trained_loss: Held-out loss of the trained graph, on the same tokens.

    Returns:
        The candidate and one sentence.

    Raises:
        MergeError: The chosen one is worse than the trained graph by more than ``merge.max_loss_increase``.
    """
    if config.choose == "heldout_loss":
        best = min(figures, key=lambda one: one["loss"])
        rule = f"lowest held-out loss, {best['loss']:.4f} (merge.choose=heldout_loss)"
    elif config.choose == "fidelity":
        best = min(figures, key=lambda one: one["kl"])
        rule = f"nearest to the trained graph, KL {best['kl']:.5f} (merge.choose=fidelity)"
    else:
        best = next(one for one in figures if one["name"] == config.choose)
        rule = f"named by merge.choose={config.choose}"
    # Written so that a loss that is not a number fails too.
    if not best["loss"] - trained_loss <= config.max_loss_increase:
        worse = best["loss"] - trained_loss
        raise MergeError(
            f"the best candidate, {best['name']}, has a held-out loss of {best['loss']:.4f} and the trained graph {trained_loss:.4f}: "
            f"worse by {worse:.4f}, and merge.max_loss_increase is {config.max_loss_increase}; ship the adapter, or raise it"
        )
    return best, rule


def table_rows(figures: Sequence[dict[str, Any]], *, trained: dict[str, Any]) -> list[list[str]]:
    """The merge table as text, the trained graph first."""
    rows = [["trained graph", "0", "1.000", f"{trained['loss']:.4f}", "", f"{trained['perplexity']:.3f}", ""]]
    for one in figures:
        loss = [f"{one['loss']:.4f}", change_text(one["loss_difference"])]
        figure = [f"{one['perplexity']:.3f}", human_bytes(one["bytes"])]
        rows.append([one["name"], f"{one['kl']:.5f}", f"{one['top1_agreement']:.3f}", *loss, *figure])
    return rows
