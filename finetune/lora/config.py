"""The lora group: which weights learn, how much room they get, and where they start."""

from collections.abc import Iterator
from dataclasses import dataclass, field

ALL_LINEAR = "all-linear"
VARIANTS = ("lora", "rslora", "dora", "olora", "eva", "pissa", "loftq")
DOUBLED = ("olora", "pissa")
"""They start at parts of the base's own weights, so the adapter holds what it learns and the start that is taken off."""

QUANTIZED_ONLY = ("nf4", "fp4")
"""LoftQ starts at the rounding errors of these; LLM.int8's are a hundred times smaller and an unquantized base has none."""


DORA_BASES = ("none", "nf4", "fp4")


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Which weights learn, how much room they get, and where they start."""

    variant: str = "lora"
    """``lora``, or one that scales (``rslora``: by alpha / sqrt(rank)), splits (``dora``: length and direction of each
    row) or starts otherwise: ``olora`` (QR of the weight), ``pissa`` (its largest singular vectors), ``eva`` (those of
    the layer's inputs on the data), ``loftq`` (those of the quantization's error). The base is never changed."""

    rank: int
    """Columns of A, rows of B. Adapter memory grows linearly with it."""

    alpha: float
    """The update is scaled by ``alpha / rank``; keep the ratio when you change the rank."""

    dropout: float
    """Share of the adapter's inputs zeroed while training, 0 to below 1."""

    targets: list[str]
    """Last name segments of the linear layers to adapt, e.g. ``q_proj``; ``all-linear`` takes all but the head."""

    dtype: str
    """Numbers of the adapter: ``float32`` keeps small updates that ``bfloat16`` rounds away. DoRA's lengths stay float32."""

    tokens: list[str] = field(default_factory=list)
    """Tokens of the vocabulary whose embeddings are trained too, e.g. those of a chat template that the base never saw:
    one row each, in the head as well where it is tied to the embedding."""

    calibration_tokens: int = 2048
    """``eva`` only: tokens of training documents that go through the base once, before the first step."""

    @property
    def width(self) -> int:
        """Rank of the adapter as it lies in memory and on disk; plain peft reads it as this rank."""
        return self.rank * 2 if self.variant in DOUBLED else self.rank

    @property
    def step0_bound(self) -> float | None:
        """How far the adapted model's logits may be from the base's before the first step, in standard deviations of them.

        0: to the bit. ``olora`` and ``pissa`` start with a sum that cancels: 0 in bfloat16, 4e-6 in float32 were seen.
        ``dora`` divides each row by its length: 0 was seen on a CPU; under CUDA's autocast peft rounds the length to
        bfloat16, which made 0.2 where it was imitated. None: ``loftq`` starts nearer to the unquantized base, on purpose.
        """
        return {"loftq": None, "dora": 0.5, "olora": 1e-3, "pissa": 1e-3}.get(self.variant, 0.0)

    def problems(self) -> Iterator[str]:
        if self.variant not in VARIANTS:
            yield f"lora.variant must be one of {', '.join(VARIANTS)}; got {self.variant!r}"
        if self.rank < 1:
            yield f"lora.rank must be at least 1; got {self.rank}"
        if self.alpha <= 0:
            yield f"lora.alpha must be positive, or the adapter has no effect; got {self.alpha}"
        if not 0 <= self.dropout < 1:
            yield f"lora.dropout must be at least 0 and below 1; got {self.dropout}"
        if not self.targets:
            yield "lora.targets is empty, so nothing would train; name a layer, e.g. [q_proj, v_proj], or [all-linear]"
        if ALL_LINEAR in self.targets and len(self.targets) > 1:
            yield f"lora.targets: {ALL_LINEAR} already takes every linear layer; got {self.targets}: leave the others out"
        if self.dtype not in ("float32", "bfloat16"):
            yield f"lora.dtype must be float32 or bfloat16; got {self.dtype!r}"
        if self.variant == "eva" and self.calibration_tokens < 2 * self.rank:
            yield (
                f"lora.calibration_tokens must be at least twice lora.rank, or variant=eva finds no {self.rank} directions; "
                f"got {self.calibration_tokens}"
            )

    def conflicts(self, *, quantization: str, weight_decay: float) -> Iterator[str]:
        """Problems with what other groups say.

        Args:
            quantization: ``quantization.method``.
            weight_decay: ``optim.weight_decay``.
        """
        if self.variant == "loftq" and quantization not in QUANTIZED_ONLY:
            yield (
                f"lora.variant=loftq starts at the error of 4-bit rounding; got quantization.method={quantization}: "
                "choose quantization=nf4, or another variant such as lora.variant=eva"
            )
        if self.variant == "dora" and quantization not in DORA_BASES:
            why = (
                "peft 0.21 loses an int8 layer's scales when it does on a CPU"
                if quantization == "int8"
                else "only bitsandbytes' was tried"
            )
            yield (
                f"lora.variant=dora reads each weight in every pass, and {why}; "
                f"got quantization.method={quantization}: choose quantization=nf4"
            )
        if self.variant in DOUBLED and weight_decay != 0:
            yield (
                f"lora.variant={self.variant} starts at the base's own weights, which weight decay would pull to 0; "
                f"got optim.weight_decay={weight_decay}: set optim.weight_decay=0"
            )
