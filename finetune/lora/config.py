"""The lora group."""

from collections.abc import Iterator
from dataclasses import dataclass, field

ALL_LINEAR = "all-linear"
VARIANTS = ("lora", "rslora", "dora", "olora", "eva", "pissa", "loftq")
DOUBLE_RANK = ("olora", "pissa")
"""They are initialised from the base's weights, so the adapter holds the trained update and the initial one to
subtract."""

QUANTIZED_ONLY = ("nf4", "fp4")
"""LoftQ corrects the rounding errors of these; LLM.int8's are a hundred times smaller, an unquantized base has none."""

DORA_BASES = ("none", "nf4", "fp4")

EXPERTS = ("none", "each", "shared")
ROUTER_LOSSES = ("gpt_oss", "mixtral", "qwen3_5_moe_text", "qwen3_moe")
"""Families whose routers have an auxiliary loss in transformers 5.23, of those that the tests train."""


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Selects the layers to adapt, the size of their adapters, and their initialisation."""

    variant: str = "lora"
    """``lora``; ``rslora`` scales by alpha / sqrt(rank); ``dora`` trains length and direction of each row separately.
    The others change the initialisation: ``olora`` (QR of the weight), ``pissa`` (its largest singular vectors),
    ``eva`` (those of the layer's inputs on the data), ``loftq`` (those of the quantization error). The base is never
    changed."""

    rank: int
    """Columns of A, rows of B. Adapter memory grows linearly with it."""

    alpha: float
    """The update is scaled by ``alpha / rank``; keep the ratio when you change the rank."""

    dropout: float
    """Probability that an input of the adapter is zeroed during training, at least 0 and below 1."""

    targets: list[str]
    """Last name segments of the linear layers to adapt, e.g. ``q_proj``; ``all-linear`` takes all but the head and
    gates of width one. Routers are not linear layers; for experts see ``experts``."""

    dtype: str
    """Dtype of the adapter: ``float32`` keeps small updates that ``bfloat16`` rounds away. DoRA's lengths stay
    float32."""

    tokens: list[str] = field(default_factory=list)
    """Tokens of the vocabulary whose embeddings are trained too, e.g. those of a chat template that the base does not
    know: one row each, also in the head where it is tied to the embedding."""

    experts: str = "none"
    """Adapts gate, up and down of a mixture's experts too: ``each`` with matrices of its own, or all experts of a layer
    with the same matrices, ``shared``, which is as many times smaller as a layer has experts, and which every token
    trains. Needs ``quantization=nf4`` or ``fp4``, where experts are linear layers. The adapter then fits this project's
    loader only; the merged model is a plain one. With ``each``, an expert that no token of a step reaches is not
    trained in that step."""

    routers: bool = False
    """Trains the routers of a mixture too, whole, and adds the model's auxiliary load-balancing loss times the
    ``router_aux_loss_coef`` of its config.json to the training loss. Frozen by default: routers of a trained mixture
    are balanced, and few rows can unlearn that. For ``train.objective=sft`` in one process."""

    calibration_tokens: int = 2048
    """``eva`` only: tokens of training documents that it is initialised from."""

    @property
    def width(self) -> int:
        """Returns the rank of the adapter in memory and on disk, which is the rank that peft reads."""
        return self.rank * 2 if self.variant in DOUBLE_RANK else self.rank

    @property
    def step0_bound(self) -> float | None:
        """Returns the allowed difference to the base's logits before the first step, in standard deviations of them.

        0: equal to the bit. ``olora`` and ``pissa`` begin with a sum that cancels: 0 in bfloat16, 4e-6 in float32 were
        measured. ``dora`` divides each row by its length: 0 was measured on a CPU; under CUDA's autocast peft rounds
        the length to bfloat16, which gave 0.2 in an emulation. None: ``loftq`` differs on purpose, as it corrects the
        base."""
        return {"loftq": None, "dora": 0.5, "olora": 1e-3, "pissa": 1e-3}.get(self.variant, 0.0)

    @property
    def adapts_experts(self) -> bool:
        """Returns whether experts have adapters."""
        return self.experts != "none"

    def mixture_problems(self, *, name: str, family: str, has_experts: bool) -> Iterator[str]:
        """Yields what a model cannot do with its experts and routers.

        Args:
            name: ``model.name``.
            family: Its ``model_type``.
            has_experts: Whether it is a mixture.
        """
        asked = [f"lora.experts={self.experts}"] * self.adapts_experts + ["lora.routers=true"] * self.routers
        if asked and not has_experts:
            yield f"{' and '.join(asked)}: {name} ({family}) has no experts; leave that out"
        elif self.routers and family not in ROUTER_LOSSES:
            yield (
                f"lora.routers=true: routers of {family} have no auxiliary loss that keeps their experts balanced "
                f"(those of {', '.join(ROUTER_LOSSES)} have one); set lora.routers=false"
            )

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yields the settings that have no effect given the others, each with the reason."""
        if self.variant != "eva":
            yield "calibration_tokens", f"it is EVA's, and lora.variant={self.variant}"

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
            yield f"lora.targets: {ALL_LINEAR} selects every linear layer; got {self.targets}: remove the others"
        if self.experts not in EXPERTS:
            remedy = {"True": ": set lora.experts=each, which is what true was", "False": ": set lora.experts=none"}
            hint = remedy.get(self.experts, "")
            yield f"lora.experts must be one of {', '.join(EXPERTS)}; got {self.experts!r}{hint}"
        if self.dtype not in ("float32", "bfloat16"):
            yield f"lora.dtype must be float32 or bfloat16; got {self.dtype!r}"
        if self.variant == "eva" and self.calibration_tokens < 2 * self.rank:
            yield (
                f"lora.calibration_tokens must be at least twice lora.rank, or variant=eva cannot find "
                f"{self.rank} directions; got {self.calibration_tokens}"
            )

    def conflicts(self, *, quantization: str, weight_decay: float) -> Iterator[str]:
        """Yields conflicts with other groups.

        Args:
            quantization: ``quantization.method``.
            weight_decay: ``optim.weight_decay``.
        """
        if self.variant == "loftq" and quantization not in QUANTIZED_ONLY:
            yield (
                f"lora.variant=loftq corrects the error of 4-bit rounding; got quantization.method={quantization}: "
                "choose quantization=nf4, or another variant such as lora.variant=eva"
            )
        if self.variant == "dora" and quantization not in DORA_BASES:
            int8_reason = "on a CPU peft 0.21 then loses an int8 layer's scales"
            reason = int8_reason if quantization == "int8" else "this is tested with bitsandbytes' 4 bits only"
            yield (
                f"lora.variant=dora reads each weight in every pass, and {reason}; "
                f"got quantization.method={quantization}: choose quantization=nf4"
            )
        if self.adapts_experts and quantization not in QUANTIZED_ONLY:
            yield (
                f"lora.experts={self.experts} needs experts in 4 bits; got quantization.method={quantization}: choose "
                "quantization=nf4_double, or lora.experts=none"
            )
        if self.adapts_experts and self.variant not in ("lora", "rslora"):
            yield (
                f"lora.experts={self.experts} is for lora.variant=lora and rslora; got {self.variant}, which reads "
                "every layer's weight or input when it starts: choose lora.variant=lora, or lora.experts=none"
            )
        if self.routers and weight_decay != 0:
            yield (
                "lora.routers=true trains whole weights, which weight decay pulls to 0 and not to those of the base; "
                f"got optim.weight_decay={weight_decay}: set optim.weight_decay=0"
            )
        if self.variant in DOUBLE_RANK and weight_decay != 0:
            yield (
                f"lora.variant={self.variant} is initialised from the base's weights, and weight decay pulls to 0; "
                f"got optim.weight_decay={weight_decay}: set optim.weight_decay=0"
            )
