"""The merge group."""

from collections.abc import Iterator
from dataclasses import dataclass, field

CANDIDATES = ("dequantized", "original")
RULES = ("heldout_loss", "fidelity")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """Which weights the adapter is merged into, and how that is decided.

    ``dequantized`` + BA is the graph that was trained. ``original`` + BA is another model, sometimes a better one.
    """

    choose: str
    """``heldout_loss`` (the lowest), ``fidelity`` (the nearest to the trained graph), or a candidate's name."""

    candidates: list[str]
    """Those that are built and measured: ``dequantized``, ``original``. Each takes the disk of a whole model meanwhile."""

    max_loss_increase: float
    """Nats per token that the chosen one may be worse than the trained graph on held-out rows before the stage fails."""

    loss_rows: int
    """Held-out rows that the losses of the trained graph, of each candidate and of the kept one are taken on, from the top:
    the very rows of ``eval.loss_rows``."""

    measure_tokens: int
    """Trained tokens of these rows, from the top, whose whole distributions are compared; each takes 4 bytes times the
    vocabulary on disk meanwhile."""

    batch_tokens: int
    """Padded tokens per forward pass while measuring."""

    dtype: str
    """Numbers of the merged weights: ``bfloat16``, ``float16`` or ``float32``."""

    max_reload_difference: float
    """Nats per token by which the loss of the reloaded model, and its KL, may differ from the first measurement."""

    adapters: dict[str, float] = field(default_factory=dict)
    """Further adapters of the same base, by folder, each with the weight that its change is added with; the run's own
    has 1. Only plain LoRA and rsLoRA add up. The trained graph is then the one with all of them."""

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
