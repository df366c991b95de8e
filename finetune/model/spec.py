"""A base model and how it is loaded: everything needed to build the same weights in memory again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.hardware import Placement
from finetune.model.base import Base, ModelFiles, fetch
from finetune.model.config import ModelConfig
from finetune.quantization.config import PREQUANTIZED, QAT, QuantizationConfig, spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A base model and how it is loaded.

    Attributes:
        base: The weights on disk.
        config: The model group.
        quantization: The quantization group.
        placement: Device, dtype and attention.
    """

    base: Base
    config: ModelConfig
    quantization: QuantizationConfig
    placement: Placement

    @classmethod
    def resolve(cls, config: RunConfig, placement: Placement, *, files: ModelFiles | None = None) -> ModelSpec:
        """Fetches the base that a configuration names, weights included, and returns how it is loaded.

        Args:
            config: The whole configuration.
            placement: Device, dtype and attention.
            files: Config and tokenizer as `find` found them, for weights of the same commit; None finds them here.
        """
        base = fetch(config.model, files)
        return cls(base=base, config=config.model, quantization=config.quantization, placement=placement)

    @property
    def is_quantized(self) -> bool:
        """Whether the linear layers are quantized."""
        return self.quantization.method != "none"

    @property
    def is_prequantized(self) -> bool:
        """Whether the base's own files hold them quantized, so that there is no dense base."""
        return self.quantization.method == PREQUANTIZED

    @property
    def is_rounded_with_adapter(self) -> bool:
        """Whether the base is dense in memory too, and each pass rounds its sum with the adapter."""
        return self.quantization.method == QAT

    def load(self, *, max_memory: dict[int | str, int] | None = None, scratch: Path | None = None) -> PreTrainedModel:
        """Loads the model; see `finetune.model.load.load_model`."""
        from finetune.model.load import load_model

        return load_model(self, max_memory=max_memory, scratch=scratch)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer; see `finetune.model.load.load_tokenizer`."""
        from finetune.model.load import load_tokenizer

        return load_tokenizer(self.base, trust_remote_code=self.config.trust_remote_code, template=self.config.template)

    def dense(self, folder: Path | None = None, *, dtype: str | None = None) -> ModelSpec:
        """Returns the same model without quantization.

        Args:
            folder: Another checkpoint of the same architecture, e.g. the merged model.
            dtype: To compute in; None takes the run's. A checkpoint in another dtype keeps its own, unless the run
                computes in float32, which holds every bfloat16 and float16 value exactly.
        """
        base = self.base if folder is None else dataclasses.replace(self.base, folder=folder)
        if dtype is None:
            dtype = self.placement.dtype
            if folder is not None and dtype != "float32":
                dtype = checkpoint_dtype(folder)
        placement = dataclasses.replace(self.placement, dtype=dtype)
        quantization = dataclasses.replace(self.quantization, method="none", double=False)
        return dataclasses.replace(self, base=base, quantization=quantization, placement=placement)

    def as_stored(self) -> ModelSpec:
        """Returns the base as its own files hold it: without quantization, or quantized where they are."""
        return self if self.is_prequantized else self.dense()

    def on(self, device: str) -> ModelSpec:
        """Returns the same model on another device."""
        return dataclasses.replace(self, placement=dataclasses.replace(self.placement, device=device))

    def key(self) -> dict[str, Any]:
        """Returns all that changes the model's outputs: weights, quantization, upcast, device, dtype, attention."""
        placement = self.placement
        return {
            "model.sha256": self.base.sha256,
            "model.upcast": self.config.upcast,
            "quantization": spec(self.quantization),
            "placement.device": placement.device,
            "placement.dtype": placement.dtype,
            "placement.attention": placement.attention,
        }


def checkpoint_dtype(folder: Path) -> str:
    """Reads the dtype that a checkpoint was saved in, e.g. ``bfloat16``."""
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(settings["dtype"])


def read_spec(content: dict[str, Any]) -> ModelSpec:
    """Rebuilds a spec from its JSON, for another process."""
    base, config = content["base"], {**content["config"], "architecture": None}
    return ModelSpec(
        base=Base(**{**base, "folder": Path(base["folder"])}),
        config=ModelConfig(**config),
        quantization=QuantizationConfig(**content["quantization"]),
        placement=Placement(**content["placement"]),
    )
