"""Each kind of adapter, merged, computes what peft computes with it unmerged."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune import lora
from finetune.errors import MergeError, ModelError
from finetune.inference.adapted import load_adapted_model
from finetune.lora.config import VARIANTS
from finetune.merge.adapter_deltas import EmbeddingRows, add_changes, read_changes
from finetune.merge.candidates import build, from_disk
from finetune.merge.graph import add_adapters
from tests.fixtures.artifacts import Line, make_adapter
from tests.fixtures.graphs import weights_of

IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 2]])
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 32, "k_proj": 3}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole_norm": {"modules_to_save": ["norm"]},
    "whole_embedding": {"modules_to_save": ["embed_tokens"]},
    "token_rows": {"trainable_token_indices": {"embed_tokens": [3, 40, 50]}},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_merged_logits_equal_the_adapters(loud_base: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    adapter = make_adapter(loud_base, tmp_path, **KINDS[kind]).folder / "adapter"
    built = build(loud_base, read_changes(adapter), tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(loud_base, dtype=torch.float32)
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(adapter)))
    result = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert (expected - plain).abs().max() > 0.1
    assert (result - expected).abs().max() < 2e-3 * expected.abs().max()
    assert built.changed > 0


@pytest.mark.parametrize(
    "kind", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}], ids=str
)
@pytest.mark.filterwarnings("ignore")
def test_embedding_that_grew_by_new_tokens_is_merged_with_them(
    loud_base: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    def grown() -> Any:
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_pretrained(loud_base, dtype=torch.float32)
        model.resize_token_embeddings(520, mean_resizing=False)
        return model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **kind}
    model = get_peft_model(grown(), LoraConfig(**settings))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    build(loud_base, read_changes(tmp_path / "adapter"), tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([[1, 40, 513, 60, 519, 2]])
    with torch.no_grad():
        expected = PeftModel.from_pretrained(grown(), str(tmp_path / "adapter")).eval()(input_ids=ids).logits
        result = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(input_ids=ids).logits
    shared = min(expected.shape[-1], result.shape[-1])
    assert (result[..., :shared] - expected[..., :shared]).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("method", ["none", "nf4"])
def test_several_adapters_add_up_as_peft_adds_them(
    line: Callable[..., Line], loud_base: Path, tmp_path: Path, method: str
) -> None:
    parts = line(method, dtype="float32")
    first, second, third = (
        make_adapter(loud_base, tmp_path / str(seed), seed=seed, **settings).folder / "adapter"
        for seed, settings in (
            (3, {}),
            (4, {"r": 2, "use_rslora": True}),
            (5, {"target_modules": ["q_proj", "down_proj"]}),
        )
    )
    graph = load_adapted_model(parts.spec, first)
    alone = logits(graph)
    add_adapters(graph, {str(second): 0.5, str(third): -0.25}, base_sha256=parts.spec.base.sha256)
    together = logits(graph)
    changes = add_changes(add_changes(read_changes(first), second, weight=0.5), third, weight=-0.25)
    source = from_disk if method == "none" else weights_of(graph)
    build(parts.spec.base.folder, changes, tmp_path / "merged", dtype=torch.float32, source=source)
    result = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert (together - alone).abs().max() > 0.1
    assert (result - together).abs().max() < 2e-3 * together.abs().max()
    for number, folder in enumerate((second, third)):
        graph.load_adapter(str(folder), adapter_name=f"plain_{number}", autocast_adapter_dtype=False)
    graph.add_weighted_adapter(["default", "plain_0", "plain_1"], [1.0, 0.5, -0.25], "sum", combination_type="cat")
    graph.set_adapter("sum")
    assert (logits(graph) - together).abs().max() < 2e-2 * together.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"use_dora": True}, "not by plain LoRA alone"), ({"modules_to_save": ["norm"]}, "not by plain LoRA alone")],
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_do_not_add_up_are_refused(
    loud_base: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    run_adapter = make_adapter(loud_base, tmp_path / "own").folder / "adapter"
    further = make_adapter(loud_base, tmp_path / "further", **settings).folder / "adapter"
    with pytest.raises(MergeError, match=message):
        add_changes(read_changes(run_adapter), further, weight=1.0)


@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("upcast", ["none", "all"])
def test_trained_tokens_come_back_and_merge(
    line: Callable[..., Line], tokenizer: Any, tmp_path: Path, method: str, upcast: str
) -> None:
    """EmbeddingRows of the embedding, and of the head that is tied to it: trained, saved, loaded again, merged."""
    parts = line(method, dtype="float32")
    trained = train_a_little(
        parts, tmp_path / "adapter", "lora", tokenizer=tokenizer, upcast=upcast, tokens=["<|im_end|>", "W"]
    )
    spec = dataclasses.replace(parts.spec, config=dataclasses.replace(parts.spec.config, upcast=upcast))
    graph = load_adapted_model(spec, tmp_path / "adapter")
    expected = logits(graph)
    assert torch.equal(expected, trained)
    changes = read_changes(tmp_path / "adapter")
    rows = changes["model.embed_tokens.weight"]
    assert isinstance(rows, EmbeddingRows)
    assert sorted(rows.indices.tolist()) == sorted([2, tokenizer.get_vocab()["W"]])
    old = load_file(parts.spec.base.folder / "model.safetensors")["model.embed_tokens.weight"][rows.indices].float()
    assert (rows.values.float() - old).abs().max() > 0.01, "they were trained"
    build(
        parts.spec.base.folder,
        changes,
        tmp_path / "merged",
        dtype=torch.float32,
        source=from_disk if method == "none" else weights_of(graph),
    )
    result = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert (result - expected).abs().max() < 1e-4 * expected.abs().max()


def test_token_that_is_not_in_the_vocabulary_is_named(
    line: Callable[..., Line], tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"lora.tokens: <tool> not in the vocabulary"):
        train_a_little(line("none"), tmp_path, "lora", tokenizer=tokenizer, tokens=["<tool>"])


@pytest.mark.parametrize(
    ("variant", "method"), [(v, m) for v in VARIANTS for m in ("none", "nf4", "fp4") if (v, m) != ("loftq", "none")]
)
def test_every_variant_merges_to_the_graph_that_was_trained(
    line: Callable[..., Line], tmp_path: Path, variant: str, method: str
) -> None:
    """The trained graph is peft's own forward pass over the base as it was quantized; nothing is merged in it."""
    parts = line(method, dtype="float32")
    train_a_little(parts, tmp_path / "adapter", variant)
    graph = load_adapted_model(parts.spec, tmp_path / "adapter")
    expected = logits(graph)
    with graph.disable_adapter():
        plain = logits(graph)
    source = from_disk if method == "none" else weights_of(graph)
    build(
        parts.spec.base.folder,
        read_changes(tmp_path / "adapter"),
        tmp_path / "merged",
        dtype=torch.float32,
        source=source,
    )
    result = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert (expected - plain).abs().max() > 0.1
    assert (result - expected).abs().max() < 1e-4 * expected.abs().max()


def train_a_little(
    parts: Line, folder: Path, variant: str, *, tokenizer: Any = None, upcast: str = "none", tokens: Sequence[str] = ()
) -> torch.Tensor:
    """Three steps of a variant on the line's base, saved as a run saves it; returns the logits then."""
    settings = lora.LoraConfig(
        variant=variant, rank=4, alpha=8.0, dropout=0.0, targets=["all-linear"], dtype="float32", tokens=list(tokens)
    )
    base = parts.spec.load()
    documents = [list(range(start, start + 30)) for start in (10, 60, 200)]
    model = lora.attach(
        base,
        settings,
        upcast=upcast,
        checkpointing=False,
        seed=1,
        calibration=documents,
        original=parts.spec.base.folder,
        tokenizer=tokenizer,
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder))
    return logits(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]}, "target_parameters"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_adapter_that_is_no_change_of_weights_is_refused(
    loud_base: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    adapter = make_adapter(loud_base, tmp_path, **settings).folder / "adapter"
    with pytest.raises(MergeError, match=message):
        read_changes(adapter)


def test_other_kind_of_adapter_is_refused(loud_base: Path, tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(loud_base), IA3Config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    with pytest.raises(MergeError, match="IA3 adapter; merging supports LORA"):
        read_changes(tmp_path)


def test_weights_in_pieces_equal_weights_at_once(
    loud_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(loud_base, tmp_path, use_dora=True).folder / "adapter"
    build(loud_base, read_changes(adapter), tmp_path / "whole", dtype=torch.bfloat16)
    monkeypatch.setattr("finetune.merge.checkpoint.PIECE_BYTES", 1000)
    build(loud_base, read_changes(adapter), tmp_path / "pieces", dtype=torch.bfloat16)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "pieces" / "model.safetensors"
    ).read_bytes()


def test_base_that_is_cut_off_is_refused(loud_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((loud_base / "config.json").read_text())
    whole = (loud_base / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(MergeError, match="is cut off"):
        build(tmp_path, {}, tmp_path / "out", dtype=torch.bfloat16)
