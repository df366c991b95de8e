"""A tiny base with random weights large enough to matter, adapters on it, and held-out rows."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune.hardware import Placement
from finetune.model import Base, ModelConfig
from finetune.model.base import weights_sha256
from finetune.quantization import QuantizationConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A stage's product, as another room would have left it."""

    folder: Path


@dataclass(frozen=True, kw_only=True)
class Line:
    """What the merge, eval and export verbs are given."""

    base: Base
    model: ModelConfig
    quantization: QuantizationConfig
    placement: Placement
    data: Made


def quantization(method: str) -> QuantizationConfig:
    return QuantizationConfig(method=method, double=method == "nf4")


def model_config(folder: Path) -> ModelConfig:
    return ModelConfig(
        name=str(folder), revision=None, dtype="auto", attention="auto", upcast="none", remote_code={}, architecture=None
    )  # fmt: skip


def base_of(folder: Path) -> Base:
    return Base(folder=folder, name=str(folder), revision=None, sha256=weights_sha256(folder), source="folder")


def placement(dtype: str = "bfloat16") -> Placement:
    return Placement(
        device="cpu", dtype=dtype, attention="sdpa", optimizer="adamw_torch", optimizer_reason="test", threads=1, reasons=()
    )  # fmt: skip


@pytest.fixture(scope="session")
def heldout(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Ten chats as the data room writes them; only the answer is trained."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(10):
        question = [{"role": "user", "content": f"Wake me at {number} on Monday, please." * (1 + number % 3)}]
        reference = json.dumps({"intent": "alarm", "time": f"0{number}:00"})
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        end = [*tokenizer.encode(reference, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append({
            "input_ids": prompt + end, "labels": [-100] * len(prompt) + end, "seq_lengths": [len(prompt) + len(end)], "rows": [number],
            "prompt_ids": prompt, "reference": reference, "row": number,
        })  # fmt: skip
    Dataset.from_list(rows).save_to_disk(str(folder / "heldout"))
    return Made(folder=folder)


@pytest.fixture(scope="session")
def loud_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with weights ten times as large, so that its distributions are far from uniform."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("loud") / "base"
    shutil.copytree(tiny_base, folder)
    tensors = load_file(folder / "model.safetensors")
    loud = {
        name: (tensor * 10 if "proj" in name else tensor * 4 if "embed" in name else tensor)
        for name, tensor in tensors.items()
    }
    save_file(loud, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def line(loud_base: Path, heldout: Made) -> Callable[..., Line]:
    def make(method: str = "nf4", *, folder: Path = loud_base, dtype: str = "bfloat16") -> Line:
        return Line(
            base=base_of(folder),
            model=model_config(folder),
            quantization=quantization(method),
            placement=placement(dtype),
            data=heldout,
        )

    return make


def make_adapter(base: Path, folder: Path, *, size: float = 0.05, seed: int = 3, **settings: Any) -> Made:
    """A random peft adapter: B is not zero, so it changes the model as training would. No step is taken."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)
    wished = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**wished))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name and "lora_A" not in name:
                parameter.add_(torch.randn(parameter.shape) * size)
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand(parameter.shape) * size * 4)
    model.save_pretrained(folder / "adapter")
    return Made(folder=folder)


@pytest.fixture(scope="session")
def adapter(loud_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_adapter(loud_base, tmp_path_factory.mktemp("train"))
