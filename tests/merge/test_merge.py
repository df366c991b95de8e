"""The merged model is the model that was trained, and the stage notices when it is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import Line, Made, make_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.errors import MergeError
from finetune.measure import agreement, read_rows, reference_logprobs, trained_graph
from finetune.merge import MergeConfig, MergedModel, merge
from finetune.merge.candidates import build
from finetune.merge.changes import read_changes
from finetune.merge.graph import dequantized

CONFIG: dict[str, Any] = {
    "choose": "fidelity", "candidates": ["dequantized", "original"], "max_loss_increase": 0.5, "measure_tokens": 200, "batch_tokens": 512,
    "dtype": "bfloat16", "max_reload_difference": 0.001,
}  # fmt: skip


def run(folder: Path, line: Line, adapter: Made, **settings: Any) -> MergedModel:
    config = MergeConfig(**{**CONFIG, **settings})
    return merge(
        config, folder=folder, base=line.base, model=line.model, quantization=line.quantization, placement=line.placement,
        adapter=adapter, data=line.data, seed=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def merged(line: Callable[..., Line], adapter: Made, tmp_path_factory: pytest.TempPathFactory) -> MergedModel:
    return run(tmp_path_factory.mktemp("merge"), line(), adapter)


def figures(merged: MergedModel, name: str) -> dict[str, Any]:
    return next(one for one in merged.candidates if one["name"] == name)


def test_dequantized_candidate_is_the_trained_graph_and_the_original_is_not(merged: MergedModel) -> None:
    assert figures(merged, "dequantized")["kl"] < 1e-3
    assert figures(merged, "dequantized")["top1_agreement"] > 0.9  # a random model's first two tokens are nearly tied
    assert figures(merged, "original")["kl"] > 20 * figures(merged, "dequantized")["kl"]
    assert merged.chosen == "dequantized"


def test_fresh_process_measures_what_the_stage_measured(merged: MergedModel) -> None:
    assert merged.reloaded["loss"] == pytest.approx(figures(merged, merged.chosen)["loss"], abs=1e-3)


def test_merge_on_the_4bit_model_is_clearly_worse(line: Callable[..., Line], adapter: Made, merged: MergedModel, tmp_path: Path) -> None:
    """The planted bug: peft rounds the sum back to 4 bits, and most of the adapter is lost."""
    parts = line()
    rows = read_rows(parts.data.folder / "heldout")
    graph = trained_graph(
        parts.base, parts.model, quantization=parts.quantization, placement=parts.placement, adapter=adapter.folder / "adapter"
    )  # fmt: skip
    reference = reference_logprobs(graph, rows, tmp_path / "reference.f32", batch_tokens=512)
    wrong = agreement(graph.merge_and_unload(), rows, reference, batch_tokens=512)
    assert wrong.kl > 20 * figures(merged, "dequantized")["kl"]


def test_merged_folder_has_the_names_of_the_base_and_a_tied_head(merged: MergedModel, loud_base: Path) -> None:
    folder = merged.folder / "model"
    with safe_open(folder / "model.safetensors", "pt") as new, safe_open(loud_base / "model.safetensors", "pt") as old:
        assert set(new.keys()) == set(old.keys())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert not (merged.folder / ".candidates").exists()


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_every_quantization_merges_to_its_own_graph(line: Callable[..., Line], adapter: Made, tmp_path: Path, method: str) -> None:
    parts = line(method, dtype="float32")
    rows = read_rows(parts.data.folder / "heldout")
    folder = adapter.folder / "adapter"
    graph = trained_graph(parts.base, parts.model, quantization=parts.quantization, placement=parts.placement, adapter=folder)
    reference = reference_logprobs(graph, rows, tmp_path / "reference.f32", batch_tokens=512)
    build(parts.base.folder, read_changes(folder), tmp_path / "merged", dtype=torch.float32, source=dequantized(graph))
    found = agreement(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), rows, reference, batch_tokens=512)
    assert found.kl < (1e-2 if method == "int8" else 1e-6)  # LLM.int8 rounds activations too


def test_unquantized_base_has_one_candidate(line: Callable[..., Line], adapter: Made, tmp_path: Path) -> None:
    merged = run(tmp_path, line("none"), adapter)
    assert [one["name"] for one in merged.candidates] == ["original"]
    assert merged.candidates[0]["kl"] < 1e-3


def test_adapter_that_changes_nothing_is_refused(line: Callable[..., Line], loud_base: Path, tmp_path: Path) -> None:
    inert = make_adapter(loud_base, tmp_path / "train", size=0.0)
    with pytest.raises(MergeError, match=r"changes none of .* weights"):
        run(tmp_path / "merge", line(), inert)


def test_candidate_much_worse_than_the_adapter_fails_the_stage(line: Callable[..., Line], adapter: Made, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"merge.max_loss_increase is 0.0"):
        run(tmp_path, line(), adapter, choose="original", max_loss_increase=0.0)


def test_dequantized_without_quantization_is_refused(line: Callable[..., Line], adapter: Made, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"use merge.choose=original"):
        run(tmp_path, line("none"), adapter, choose="dequantized")


def test_adapter_for_another_base_is_refused(line: Callable[..., Line], tiny_base: Path, loud_base: Path, tmp_path: Path) -> None:
    wide = make_adapter(loud_base, tmp_path / "train")
    file = wide.folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.zeros(t.shape[0], 96) if "lora_A" in name else t for name, t in tensors.items()}, file)
    with pytest.raises(Exception, match="does not fit this base"):
        run(tmp_path / "merge", line(), wide)


def test_base_in_shards_gives_the_same_weights_as_in_one_file(loud_base: Path, adapter: Made, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(loud_base, dtype=torch.bfloat16).save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    changes = read_changes(adapter.folder / "adapter")
    for name, folder in (("one", loud_base), ("many", sharded)):
        build(folder, changes, tmp_path / name, dtype=torch.bfloat16)
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_wishes_that_cannot_be_are_named_at_once() -> None:
    config = MergeConfig(**{**CONFIG, "choose": "best", "candidates": ["magic"], "dtype": "int4", "measure_tokens": 0})
    assert len(list(config.problems())) == 4
