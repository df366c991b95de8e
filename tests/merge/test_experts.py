"""The experts of a mixture are merged from their 4-bit codes, whatever form the checkpoint has them in."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import lora
from finetune.inference.adapted import load_adapter
from finetune.merge.adapter_deltas import read_changes
from finetune.merge.candidates import build, from_disk
from finetune.merge.graph import dequantized
from finetune.quantization.expert_tensors import ExpertTensor, expert_tensor
from tests.fixtures.mixtures import load_mixture, mixture_spec, write_mixture

IDS = torch.arange(48).reshape(2, 24) * 7 % 160
FORMS = [("mixtral", False), ("mixtral", True), ("qwen3_moe", False), ("gpt_oss", True)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapt(model: Any, *, experts: str, routers: bool = False) -> Any:
    """Attaches an adapter whose B is not zero, and whose routers are not the base's."""
    config = lora.LoraConfig(
        rank=2,
        alpha=4.0,
        dropout=0.0,
        targets=["q_proj", "v_proj"],
        dtype="float32",
        experts=experts,
        routers=routers,
    )
    adapted = lora.attach(model, config, upcast="none", checkpointing=False, seed=1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return adapted.eval()


@pytest.mark.parametrize(("experts", "routers"), [("none", False), ("each", False), ("shared", True)])
@pytest.mark.parametrize(("family", "fused"), FORMS)
def test_the_merge_is_the_trained_graph(family: str, fused: bool, experts: str, routers: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    original = write_mixture(base, family, fused=fused)
    graph = adapt(load_mixture(base), experts=experts, routers=routers)
    graph.save_pretrained(adapter)
    assert torch.equal(logits(load_adapter(load_mixture(base), adapter, upcast="none")), logits(graph))
    expected, spec = logits(graph), mixture_spec(base)
    changes = read_changes(adapter)
    source = dequantized(spec, graph, work=tmp_path)
    merged = build(base, changes, tmp_path / "merged", dtype=torch.float32, source=source)
    assert merged.changed > merged.adapted / 2
    opened = AutoModelForCausalLM.from_pretrained(merged.folder, attn_implementation="eager").eval()
    assert torch.allclose(logits(opened), expected, atol=1e-4)
    build(base, changes, tmp_path / "on_the_original", dtype=torch.float32, source=from_disk)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "on_the_original", attn_implementation="eager").eval()
    changed = {
        name for name, tensor in opened.state_dict().items() if not torch.equal(tensor, original.state_dict()[name])
    }
    assert any("experts" in name for name in changed) == (experts != "none")
    assert any(name.rpartition(".")[0].endswith(("gate", "router")) for name in changed) == routers


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", ExpertTensor(3, 7, "expert_gate")),
        ("model.layers.12.mlp.experts.0.down_proj.weight", ExpertTensor(12, 0, "expert_down")),
        ("model.language_model.layers.1.mlp.experts.gate_up_proj", ExpertTensor(1, None, "gate_up_proj")),
        ("model.layers.1.mlp.experts.common_gate.weight", ExpertTensor(1, None, "expert_gate")),
        ("model.layers.1.mlp.experts.2.common_gate.weight", None),
        ("model.layers.1.mlp.experts.expert_gate.weight", None),
        ("model.layers.1.mlp.experts.gate_up_proj_bias", None),
        ("model.layers.1.mlp.experts.2.expert_up.bias", None),
        ("model.layers.1.mlp.shared_experts.down_proj.weight", None),
        ("model.layers.1.mlp.gate.weight", None),
    ],
)
def test_where_a_tensor_belongs(name: str, place: ExpertTensor | None) -> None:
    assert expert_tensor(name) == place
