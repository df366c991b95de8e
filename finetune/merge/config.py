"""The merge group: the weights that the adapter is merged into, and how the result is chosen."""

from collections.abc import Iterator
from dataclasses import dataclass, field

CANDIDATES = ("dequantized", "original")
RULES = ("heldout_loss", "fidelity")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """Selects the weights that the adapter is merged into.

    ``dequantized`` + BA is the model that was trained. ``original`` + BA is a different model, sometimes a better one.
    """

    choose: str
    """``heldout_loss`` (the lowest), ``fidelity`` (the lowest KL to the trained model), or a candidate's name."""

    candidates: list[str]
    """The candidates to build and measure: ``dequantized``, ``original``. Each needs the disk space of a whole model
    until one is chosen."""

    max_loss_increase: float
    """Nats per token by which the chosen candidate may be worse than the trained model on held-out rows; above it the
    stage fails."""

    loss_rows: int
    """Number of held-out rows, from the top, on which the losses of the trained model and of each candidate are
    measured: the same rows as those of ``eval.loss_rows``."""

    measure_tokens: int
    """Trained tokens of these rows, from the top, whose whole distributions are compared; each needs 4 bytes times the
    vocabulary on disk during the stage."""

    batch_tokens: int
    """Padded tokens per forward pass while measuring."""

    dtype: str
    """Dtype of the merged weights: ``bfloat16``, ``float16`` or ``float32``."""

    max_reload_difference: float
    """Nats per token by which the loss of the reloaded model, and its KL, may differ from the first measurement."""

    adapters: dict[str, float] = field(default_factory=dict)
    """Further adapters of the same base: folder to the weight of its change; the run's adapter has weight 1. Only plain
    LoRA and rsLoRA can be added up. All are then part of the trained model that candidates are compared with."""

    def problems(self) -> Iterator[str]:
        unknown = [name for name in self.candidates if name not in CANDIDATES]
        if unknown:
            yield f"merge.candidates must be some of {', '.join(CANDIDATES)}; got {', '.join(unknown)}"
        if not self.candidates:
            yield "merge.candidates is empty, so nothing could be merged; use [dequantized, original]"
        if self.choose not in (*RULES, *CANDIDATES):
            yield f"merge.choose must be one of {', '.join((*RULES, *CANDIDATES))}; got {self.choose!r}"
        elif self.choose in CANDIDATES and self.choose not in self.candidates:
            yield f"merge.choose={self.choose} is not among merge.candidates={self.candidates}; add it there"
        if self.dtype not in DTYPES:
            yield f"merge.dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}"
        for key, value in (
            ("loss_rows", self.loss_rows),
            ("measure_tokens", self.measure_tokens),
            ("batch_tokens", self.batch_tokens),
        ):
            if value < 1:
                yield f"merge.{key} must be at least 1; got {value}"
        for folder, weight in self.adapters.items():
            if weight == 0:
                yield f"merge.adapters: {folder} has weight 0, which adds nothing; leave it out"
        for key, bound in (
            ("max_loss_increase", self.max_loss_increase),
            ("max_reload_difference", self.max_reload_difference),
        ):
            if bound < 0:
                yield f"merge.{key} must not be negative; got {bound}"
