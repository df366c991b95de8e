"""A base model and how it is loaded: everything needed to build the same weights in memory again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.hardware import Placement
from finetune.model.base import Base, fetch
from finetune.model.config import ModelConfig
from finetune.quantization.config import QuantizationConfig, spec

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
    def resolve(cls, config: RunConfig, placement: Placement) -> ModelSpec:
        """Fetches the base that a configuration names, and returns how it is loaded."""
        base = fetch(config.model)
        return cls(base=base, config=config.model, quantization=config.quantization, placement=placement)

    @property
    def is_quantized(self) -> bool:
        """Whether the linear layers are quantized."""
        return self.quantization.method != "none"

    def load(self) -> PreTrainedModel:
        """Loads the model; see `finetune.model.load.load_model`."""
        from finetune.model.load import load_model

        return load_model(self)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer; see `finetune.model.load.load_tokenizer`."""
        from finetune.model.load import load_tokenizer

        return load_tokenizer(self.base, trust_remote_code=self.config.trust_remote_code, template=self.config.template)

    def dense(self, folder: Path | None = None, *, dtype: str | None = None) -> ModelSpec:
        """Returns the same model without quantization.

        Args:
            folder: Another checkpoint of the same architecture, e.g. the merged model.
            dtype: To compute in; None takes the one in the config.json of ``folder``, or else the run's.
        """
        base = self.base if folder is None else dataclasses.replace(self.base, folder=folder)
        dtype = dtype or (self.placement.dtype if folder is None else checkpoint_dtype(folder))
        placement = dataclasses.replace(self.placement, dtype=dtype)
        quantization = dataclasses.replace(self.quantization, method="none", double=False)
        return dataclasses.replace(self, base=base, quantization=quantization, placement=placement)

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
