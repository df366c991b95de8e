"""Of an image-text model, the decoder alone is loaded, and a merge leaves the rest of the checkpoint as it is."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ModelError
from finetune.merge.adapter_deltas import LowRank
from finetune.merge.candidates import build, tied_names
from finetune.model.text_only import decoder_name, from_pretrained

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "head_dim": 8,
}  # fmt: skip
KINDS = {"gemma3": "gemma3_text", "mistral3": "ministral3"}
NAME = "layers.1.self_attn.q_proj.weight"


def image_text(kind: str, folder: Path, *, prefix: str) -> Any:
    """Saves a tiny image-text model with the hub's names of tensors; returns the model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = {**VISION, "model_type": "siglip_vision_model" if kind == "gemma3" else "pixtral"}
    image = {"mm_tokens_per_image": 4} if kind == "gemma3" else {}
    config = AutoConfig.for_model(kind, text_config={**TEXT, "model_type": KINDS[kind]}, vision_config=vision, **image)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    renamed = {
        re.sub("^model\\.(?=embed|layers|norm)", prefix, decoder_name(name)): tensor for name, tensor in saved.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_is_loaded_and_the_merge_keeps_the_tower(kind: str, prefix: str, tmp_path: Path) -> None:
    whole = image_text(kind, tmp_path / "base", prefix=prefix)
    model = from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert model.config.model_type == KINDS[kind]
    assert not [name for name, _ in model.named_modules() if "vision" in name]
    weight = model.get_submodule("model.layers.1.self_attn.q_proj").weight
    assert torch.equal(weight, whole.model.language_model.get_submodule("layers.1.self_attn.q_proj").weight)

    change = LowRank(a=torch.ones(1, 32), b=torch.ones(32, 1), scaling=0.5)
    build(tmp_path / "base", {f"model.{NAME}": change}, tmp_path / "merged", dtype=torch.float32)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [prefix + NAME]
    merged = from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged.get_submodule("model.layers.1.self_attn.q_proj").weight, weight + 0.5)


def test_a_copy_of_the_decoder_is_a_model_of_text(tmp_path: Path) -> None:
    image_text("gemma3", tmp_path / "base", prefix="language_model.model.")
    model = from_pretrained(tmp_path / "base", dtype=torch.float32)
    model.save_pretrained(tmp_path / "copy")
    again = from_pretrained(tmp_path / "copy", dtype=torch.float32)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_tied_names_are_those_of_the_decoder(tmp_path: Path) -> None:
    image_text("gemma3", tmp_path / "base", prefix="language_model.model.")
    assert tied_names(tmp_path / "base") == ("model.embed_tokens.weight", "lm_head.weight")


def test_a_checkpoint_without_the_decoders_weights_is_refused(tmp_path: Path) -> None:
    image_text("gemma3", tmp_path / "base", prefix="another_name.")
    with pytest.raises(ModelError, match="of the decoder"):
        from_pretrained(tmp_path / "base", dtype=torch.float32)
