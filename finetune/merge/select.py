"""Selects the candidate to keep: by held-out loss, by closeness to the trained model, or by name."""

from collections.abc import Sequence

from finetune.console import human_bytes
from finetune.errors import MergeError
from finetune.merge.config import MergeConfig
from finetune.scores import CandidateScores, LossScores


def select_candidate(
    candidates: Sequence[CandidateScores], *, config: MergeConfig, trained_loss: float
) -> tuple[CandidateScores, str]:
    """Selects a candidate by ``merge.choose``.

    Args:
        candidates: The scores of each.
        config: The rule and its bound.
        trained_loss: Held-out loss of the trained model, on the same tokens.

    Returns:
        The candidate, and the reason in one sentence.

    Raises:
        MergeError: Its loss is higher than the trained model's by more than ``merge.max_loss_increase``.
    """
    if config.choose == "heldout_loss":
        best = min(candidates, key=lambda candidate: candidate.loss)
        rule = f"lowest held-out loss, {best.loss:.4f} (merge.choose=heldout_loss)"
    elif config.choose == "fidelity":
        best = min(candidates, key=lambda candidate: candidate.kl)
        rule = f"closest to the trained model, KL {best.kl:.5f} (merge.choose=fidelity)"
    else:
        best = next(candidate for candidate in candidates if candidate.name == config.choose)
        rule = f"named by merge.choose={config.choose}"
    increase = best.loss - trained_loss
    if not increase <= config.max_loss_increase:  # so that NaN fails too
        raise MergeError(
            f"the best candidate, {best.name}, has a held-out loss of {best.loss:.4f} and the trained model "
            f"{trained_loss:.4f}: worse by {increase:.4f}, and merge.max_loss_increase is {config.max_loss_increase}; "
            "use the adapter instead of a merged model, or raise the bound"
        )
    return best, rule


def table_rows(candidates: Sequence[CandidateScores], *, trained: LossScores) -> list[list[str]]:
    """Returns the cells of the merge table, the trained model first."""
    rows = [["trained model", "0", "1.000", f"{trained.loss:.4f}", "", f"{trained.perplexity:.3f}", ""]]
    for candidate in candidates:
        distances = [f"{candidate.kl:.5f}", f"{candidate.top1_agreement:.3f}"]
        loss = [f"{candidate.loss:.4f}", candidate.loss_difference.text()]
        size = [f"{candidate.perplexity:.3f}", human_bytes(candidate.bytes)]
        rows.append([candidate.name, *distances, *loss, *size])
    return rows
