"""The model that preflight and training share, and the job that training gets."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from finetune import lora
from finetune.console import human_bytes, log
from finetune.errors import HardwareError
from finetune.inference.adapted import free_memory
from finetune.kernels import apply_fusion
from finetune.launch.shards import FSDP_PREVENTS_FUSION
from finetune.lora.experts import router_loss
from finetune.model.load import parameter_count, resident_bytes
from finetune.quantization.config import spec as quantization_spec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from finetune.config import RunConfig
    from finetune.kernels import Fusion
    from finetune.kernels.choose import KernelChoice
    from finetune.lora import LoraConfig
    from finetune.model import ModelSpec
    from finetune.optim import OptimConfig
    from finetune.products import PreflightResult, PreparedData
    from finetune.train import TrainConfig


RECURRENT_LAYERS = {"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"}
"""Layer types of transformers that carry a state from token to token."""


@dataclass(kw_only=True)
class TrainableModel:
    """A quantized base with an adapter on it, in memory.

    Attributes:
        model: The adapted model.
        tokenizer: Its tokenizer.
        spec: How the base was loaded.
        lora: The lora group.
        fusion: How a training step is computed.
        parameters: Weights of the base.
        base_bytes: Bytes of the base in memory.
        packing: Whether several documents may share a row without padding.
        router_loss: Factor of the auxiliary loss of trained routers; 0 without them.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    lora: LoraConfig
    fusion: Fusion
    parameters: int = 0
    base_bytes: int = 0
    packing: bool = True
    router_loss: float = 0.0

    def apply(self, result: PreflightResult) -> None:
        """Switches off packing and fused layers where the preflight found that they change the result."""
        self.packing = self.packing and result.packing_is_isolated
        self.fusion.enabled = self.fusion.enabled and result.fused_layers_are_exact


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Everything that one training needs.

    Attributes:
        config: The train group.
        optim: The optim group.
        trainable: The model in memory.
        data: The prepared rows.
        seed: Seeds the order of the rows and dropout.
    """

    config: TrainConfig
    optim: OptimConfig
    trainable: TrainableModel
    data: PreparedData
    seed: int


@contextmanager
def trainable_model(
    config: RunConfig,
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    *,
    stage: AbstractContextManager[dict[str, Any]],
    before: dict[str, Any] | None = None,
) -> Iterator[Callable[[], TrainableModel]]:
    """Yields a function that loads the trainable model on its first call; frees the model at the end.

    Args:
        config: The whole configuration.
        spec: The base and how it is loaded.
        tokenizer: Its tokenizer.
        data: Training rows, which ``lora.variant=eva`` starts from.
        stage: Entered while the model loads; it yields a dict that receives the manifest's facts about the model.
        before: The manifest of the model that this run has used so far; None for a new run.
    """

    @cache
    def load() -> TrainableModel:
        with stage as facts:
            trainable = load_trainable_model(config, spec, tokenizer, data)
            require_same_rounding(trainable.fusion.choice, before)
            facts.update(describe(trainable))
        return trainable

    try:
        yield load
    finally:
        load.cache_clear()
        gc.enable()
        free_memory()


def require_same_rounding(choice: KernelChoice, before: dict[str, Any] | None) -> None:
    """Refuses to continue a run with kernels that round differently: the adapter would be another one.

    Raises:
        HardwareError: They differ from those that the run began with.
    """
    now, then = choice.rounding(), (before or {}).get("product", {}).get("rounding", {})
    changed = [f"{name} was {then[name]} and is {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    if changed:
        raise HardwareError(
            f"kernels: this run would continue with others than it began with ({'; '.join(changed)}; now: "
            f"{'; '.join(choice.reasons)}). Continue where those of the beginning can be had, or start again with "
            "run.if_exists=overwrite"
        )


def load_trainable_model(
    config: RunConfig, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, data: PreparedData
) -> TrainableModel:
    """Loads the quantized base, attaches a new adapter and fuses layers.

    Garbage collection is off from the start of a run until here: scanning a million live objects would take a tenth of
    the startup time.
    """
    sharded = config.launch.strategy == "fsdp"  # the base is built in host memory, then sharded
    base = (spec.on("cpu") if sharded else spec).load()
    parameters, base_bytes = parameter_count(base), resident_bytes(base)
    method = spec.quantization.method
    log("model", f"{spec.config.name}: {parameters:,} parameters in {human_bytes(base_bytes)} as {method}")
    documents = None
    if config.lora.variant == "eva":
        documents = lora.read_documents(data.folder / "train", tokens=config.lora.calibration_tokens)
    adapted = lora.attach(
        base,
        config.lora,
        upcast=config.model.upcast,
        checkpointing=config.train.recomputes,
        seed=config.run.seed,
        calibration=documents,
        original=spec.base.folder,
        tokenizer=tokenizer,
    )
    fusion = apply_fusion(
        adapted,
        config.kernels,
        placement=spec.placement,
        checkpointing=config.train.checkpointing,
        fusion_obstacle=FSDP_PREVENTS_FUSION if sharded else None,
    )
    gc.freeze()
    gc.enable()
    return TrainableModel(
        model=adapted,
        tokenizer=tokenizer,
        spec=spec,
        lora=config.lora,
        fusion=fusion,
        parameters=parameters,
        base_bytes=base_bytes,
        packing=keeps_documents_apart(base.config),
        router_loss=router_loss(base, config.lora),
    )


def keeps_documents_apart(config: PreTrainedConfig) -> bool:
    """Returns whether documents can share a row: a recurrent layer would carry its state into the next document."""
    return not RECURRENT_LAYERS & set(getattr(config.get_text_config(), "layer_types", None) or ())


def describe(trainable: TrainableModel) -> dict[str, Any]:
    """Returns the manifest's facts about the model."""
    spec, model = trainable.spec, trainable.model
    return {
        "name": spec.config.name,
        "revision": spec.base.revision,
        "folder": str(spec.base.folder.resolve()),
        "sha256": spec.base.sha256,
        "parameters": trainable.parameters,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "quantization": quantization_spec(spec.quantization),
        "bytes": trainable.base_bytes,
        "kernels": list(trainable.fusion.choice.reasons),
        "rounding": trainable.fusion.choice.rounding(),
    }
