"""Experts in 4 bits: equal to transformers' own class with the dequantized weights, in values and in gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.model.load import parameter_count, resident_bytes
from finetune.quantization import quantized_layers
from finetune.quantization.experts import EXPERT_LAYERS, SplitExperts, fused_experts, split_modules
from tests.fixtures.mixtures import FAMILIES, dense_twin, load_mixture, tiny_mixture, write_mixture

IDS = torch.arange(48).reshape(2, 24) * 7 % 160
FORMS = [(family, False) for family in FAMILIES] + [("mixtral", True), ("qwen3_moe", True)]
"""Families in the form of the hub's checkpoints, and two of them with the 3-D parameters of transformers."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def gradient(model: Any) -> torch.Tensor:
    """Returns the gradient of the embedding, which the whole graph contributes to."""
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    result, embedding.grad = embedding.grad, None
    return result


@pytest.mark.parametrize(("family", "fused"), FORMS)
def test_logits_and_gradients_are_those_of_the_dense_class(family: str, fused: bool, tmp_path: Path) -> None:
    original = write_mixture(tmp_path / "base", family, fused=fused)
    unrounded = logits(original)
    loaded = load_mixture(tmp_path / "base")
    a = tiny_mixture(family)
    assert len(split_modules(loaded)) == a.layers - a.dense_layers
    twin = dense_twin(original, loaded)
    assert torch.allclose(logits(loaded), logits(twin), atol=1e-4)
    assert not torch.allclose(logits(loaded), unrounded, atol=1e-2), "nothing was rounded"
    before = gradient(loaded)
    assert torch.allclose(before, gradient(twin), atol=1e-5, rtol=1e-3)
    logits(loaded)
    assert torch.equal(before, gradient(loaded)), "an evaluation changed the gradient"


def test_every_expert_is_quantized_and_counted_as_if_dense(tmp_path: Path) -> None:
    original = write_mixture(tmp_path / "base", "qwen3_moe")
    loaded, a = load_mixture(tmp_path / "base"), tiny_mixture("qwen3_moe")
    experts = [name for name in quantized_layers(loaded) if name.endswith(EXPERT_LAYERS)]
    assert len(experts) == a.layers * a.experts * 3
    assert parameter_count(loaded) == sum(parameter.numel() for parameter in original.parameters())
    assert resident_bytes(loaded) < sum(parameter.nbytes for parameter in original.parameters()) / 2


def test_the_cached_copy_has_the_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mixture(tmp_path / "base", "mixtral")
    fresh = load_mixture(tmp_path / "base")
    assert "is cached in" in capsys.readouterr().out
    copied = load_mixture(tmp_path / "base")
    assert "quantized base of" in " ".join(capsys.readouterr().out.split())
    assert quantized_layers(copied).keys() == quantized_layers(fresh).keys()
    assert torch.equal(logits(copied), logits(fresh))


class Experts(torch.nn.Module):
    """What `SplitExperts` reads of transformers' module."""

    is_transposed, is_concatenated, has_bias = False, True, False

    def __init__(self, number: int, *, hidden: int, width: int) -> None:
        super().__init__()
        self.num_experts, self.down_proj = number, torch.empty(number, hidden, width)

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return gate * up


def split(number: int, *, hidden: int, width: int) -> Any:
    experts = SplitExperts(Experts(number, hidden=hidden, width=width)).to_empty(device="cpu")
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def test_an_expert_without_tokens_is_not_computed() -> None:
    experts = split(3, hidden=4, width=4)
    called: list[str] = []
    for name, expert in experts.named_children():
        expert.register_forward_hook(lambda *_, name=name: called.append(name))
    experts(torch.ones(2, 4), torch.tensor([[0, 2], [2, 0]]), torch.ones(2, 2))
    assert called == ["0", "2"]


def test_gradients_repeat_to_the_bit_on_several_threads() -> None:
    """Torch adds float32 gradients that meet in one row in any order, with two threads and 32,768 numbers or more."""
    torch.manual_seed(0)
    tokens, k, width, experts = 512, 4, 64, split(8, hidden=64, width=32)
    x, weights = torch.randn(tokens, width), torch.rand(tokens, k)
    chosen = torch.rand(tokens, 8).topk(k).indices

    def gradient() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        experts(leaf, chosen, weights).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(30))
    finally:
        torch.set_num_threads(threads)


def test_experts_of_an_unknown_class_stay_dense_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    original = write_mixture(tmp_path / "base", "qwen3_moe")
    initialise = Qwen3MoeExperts.__init__

    def with_a_norm(self: Any, *arguments: Any, **settings: Any) -> None:
        initialise(self, *arguments, **settings)
        self.has_post_expert_norm = True

    monkeypatch.setattr(Qwen3MoeExperts, "__init__", with_a_norm)
    loaded = load_mixture(tmp_path / "base")
    fused = dict(fused_experts(loaded))
    count = sum(parameter.numel() for experts in fused.values() for parameter in experts.parameters())
    printed = " ".join(capsys.readouterr().out.split())
    assert f"experts of class Qwen3MoeExperts are computed by transformers alone: {count:,} weights stay" in printed
    assert not split_modules(loaded)
    assert count == sum(p.numel() for name, p in original.named_parameters() if ".experts." in name)
