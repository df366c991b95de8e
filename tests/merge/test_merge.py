"""The merged model is the model that was trained, and the stage notices when it is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.errors import FinetuneError, MergeError
from finetune.inference.adapted import load_adapted_model
from finetune.inference.kl_divergence import compare_with_reference, record_reference
from finetune.inference.losses import mean_loss, row_losses
from finetune.inference.rows import read_rows
from finetune.merge import MergeConfig, merge
from finetune.merge.adapter_deltas import read_changes
from finetune.merge.candidates import build
from finetune.products import MergedModel
from finetune.scores import CandidateScores
from tests.fixtures.artifacts import Line, Made, make_adapter
from tests.fixtures.graphs import weights_of

CONFIG: dict[str, Any] = {
    "choose": "fidelity",
    "candidates": ["dequantized", "original"],
    "max_loss_increase": 0.5,
    "loss_rows": 8,
    "measure_tokens": 60,
    "batch_tokens": 512,
    "dtype": "bfloat16",
    "max_reload_difference": 0.001,
}


def run(folder: Path, line: Line, adapter: Made, **settings: Any) -> MergedModel:
    config = MergeConfig(**{**CONFIG, **settings})
    products: dict[str, Any] = {"adapter": adapter, "data": line.data}
    return merge(config, folder=folder, spec=line.spec, seed=1, **products)


@pytest.fixture(scope="module")
def merged(line: Callable[..., Line], adapter: Made, tmp_path_factory: pytest.TempPathFactory) -> MergedModel:
    return run(tmp_path_factory.mktemp("merge"), line(), adapter)


def scores_of(merged: MergedModel, name: str) -> CandidateScores:
    return next(candidate for candidate in merged.candidates if candidate.name == name)


def test_dequantized_candidate_is_the_trained_graph_and_the_original_is_not(merged: MergedModel) -> None:
    assert scores_of(merged, "dequantized").kl < 1e-3
    assert scores_of(merged, "dequantized").top1_agreement > 0.9  # a random model's first two tokens are nearly tied
    assert scores_of(merged, "original").kl > 20 * scores_of(merged, "dequantized").kl
    assert merged.chosen == "dequantized"
    assert {candidate.compared_tokens for candidate in merged.candidates} == {60}


def test_losses_are_those_of_the_first_rows_with_paired_intervals(
    merged: MergedModel, line: Callable[..., Line], adapter: Made
) -> None:
    """More rows than the distributions are kept of: the very rows that the evaluation takes."""
    parts = line()
    rows = read_rows(parts.data.folder / "heldout", limit=8)
    graph = load_adapted_model(parts.spec, adapter.folder / "adapter")
    kept = AutoModelForCausalLM.from_pretrained(merged.folder / "model", dtype=torch.bfloat16)
    assert merged.loss_rows == 8
    assert merged.reference.loss == pytest.approx(mean_loss(row_losses(graph, rows, batch_tokens=512)), abs=1e-9)
    assert scores_of(merged, "dequantized").loss == pytest.approx(
        mean_loss(row_losses(kept, rows, batch_tokens=512)), abs=1e-9
    )
    change = scores_of(merged, "original").loss_difference
    assert change.difference == pytest.approx(scores_of(merged, "original").loss - merged.reference.loss, abs=1e-9)
    assert change.low <= change.difference <= change.high
    assert change.low < change.high


def test_fresh_process_measures_what_the_stage_measured(merged: MergedModel) -> None:
    assert merged.reloaded.loss == pytest.approx(scores_of(merged, merged.chosen).loss, abs=1e-3)


def test_merge_on_the_4bit_model_is_clearly_worse(
    line: Callable[..., Line], adapter: Made, merged: MergedModel, tmp_path: Path
) -> None:
    """The planted bug: peft rounds the sum back to 4 bits, and most of the adapter is lost."""
    parts = line()
    rows = read_rows(parts.data.folder / "heldout")
    graph = load_adapted_model(parts.spec, adapter.folder / "adapter")
    reference = record_reference(graph, rows, tmp_path / "reference.f32", batch_tokens=512)
    wrong = compare_with_reference(graph.merge_and_unload(), rows, reference, batch_tokens=512)
    assert wrong.kl > 20 * scores_of(merged, "dequantized").kl


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
def test_every_quantization_merges_to_its_own_graph(
    line: Callable[..., Line], adapter: Made, tmp_path: Path, method: str
) -> None:
    parts = line(method, dtype="float32")
    rows = read_rows(parts.data.folder / "heldout")
    folder = adapter.folder / "adapter"
    graph = load_adapted_model(parts.spec, folder)
    reference = record_reference(graph, rows, tmp_path / "reference.f32", batch_tokens=512)
    build(
        parts.spec.base.folder,
        read_changes(folder),
        tmp_path / "merged",
        dtype=torch.float32,
        source=weights_of(graph),
    )
    result = compare_with_reference(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), rows, reference, batch_tokens=512
    )
    assert result.kl < (1e-2 if method == "int8" else 1e-6)  # LLM.int8 rounds activations too


def test_unquantized_base_has_one_candidate(line: Callable[..., Line], adapter: Made, tmp_path: Path) -> None:
    merged = run(tmp_path, line("none"), adapter)
    assert [candidate.name for candidate in merged.candidates] == ["original"]
    assert merged.candidates[0].kl < 1e-3


def test_adapter_that_changes_nothing_is_refused(line: Callable[..., Line], loud_base: Path, tmp_path: Path) -> None:
    inert = make_adapter(loud_base, tmp_path / "train", size=0.0)
    with pytest.raises(MergeError, match=r"changes none of .* weights"):
        run(tmp_path / "merge", line(), inert)


def test_candidate_much_worse_than_the_adapter_fails_the_stage(
    line: Callable[..., Line], adapter: Made, tmp_path: Path
) -> None:
    with pytest.raises(MergeError, match=r"merge.max_loss_increase is 0.0"):
        run(tmp_path, line(), adapter, choose="original", max_loss_increase=0.0)


def test_dequantized_without_quantization_is_refused(line: Callable[..., Line], adapter: Made, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"use merge.choose=original"):
        run(tmp_path, line("none"), adapter, choose="dequantized")


def test_adapter_for_another_base_is_refused(
    line: Callable[..., Line], tiny_base: Path, loud_base: Path, tmp_path: Path
) -> None:
    wide = make_adapter(loud_base, tmp_path / "train")
    file = wide.folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.zeros(t.shape[0], 96) if "lora_A" in name else t for name, t in tensors.items()}, file)
    with pytest.raises(Exception, match="does not fit this base"):
        run(tmp_path / "merge", line(), wide)


def test_further_adapters_are_in_the_graph_and_in_the_model(
    line: Callable[..., Line], adapter: Made, loud_base: Path, merged: MergedModel, tmp_path: Path
) -> None:
    further = make_adapter(loud_base, tmp_path / "train", seed=9)
    together = run(tmp_path / "merge", line(), adapter, adapters={str(further.folder / "adapter"): 2.0})
    assert together.adapters == {str(further.folder / "adapter"): 2.0}
    assert abs(together.reference.loss - merged.reference.loss) > 0.01
    assert scores_of(together, "dequantized").kl < 1e-3


def test_further_adapter_of_another_base_is_refused(
    line: Callable[..., Line], adapter: Made, loud_base: Path, tmp_path: Path
) -> None:
    further = make_adapter(loud_base, tmp_path / "train").folder / "adapter"
    (further / "finetune.json").write_text(json.dumps({"base": {"sha256": "0" * 64}}))
    with pytest.raises(MergeError, match=r"says that it was trained on another base"):
        run(tmp_path / "merge", line(), adapter, adapters={str(further): 1.0})
    (further / "finetune.json").unlink()
    file = further / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.zeros(t.shape[0], 96) if "lora_A" in name else t for name, t in tensors.items()}, file)
    with pytest.raises(MergeError, match=r"another base"):
        run(tmp_path / "merge", line(), adapter, adapters={str(further): 1.0})
    file.unlink()
    with pytest.raises(FinetuneError, match=r"is not an adapter: adapter_model.safetensors missing"):
        run(tmp_path / "merge", line(), adapter, adapters={str(further): 1.0})


def test_full_disk_is_said_before_anything_is_built(
    line: Callable[..., Line], adapter: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    with pytest.raises(MergeError, match=r"merging needs .* of disk .* and 1000 B are free"):
        run(tmp_path, line(), adapter)
    assert not list((tmp_path / ".candidates").iterdir())


@pytest.mark.usefixtures("real_processes")
def test_model_that_no_fresh_process_opens_does_not_replace_the_earlier_one(
    line: Callable[..., Line], adapter: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "merge" / "model").mkdir(parents=True)
    (tmp_path / "merge" / "model" / "good").write_text("an earlier model")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "transformers.py").write_text("raise ImportError('not this time')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with pytest.raises(MergeError, match=r"cannot be opened by a fresh process"):
        run(tmp_path / "merge", line("none"), adapter)
    assert [file.name for file in (tmp_path / "merge" / "model").iterdir()] == ["good"]


def test_what_a_killed_merge_left_is_cleared_and_the_earlier_model_stays_until_then(
    line: Callable[..., Line], adapter: Made, tmp_path: Path
) -> None:
    half, earlier = tmp_path / ".candidates" / "original", tmp_path / "model"
    for folder in (half, earlier):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(MergeError, match=r"merge.max_loss_increase"):
        run(tmp_path, line(), adapter, choose="original", max_loss_increase=0.0)
    assert (earlier / "model.safetensors").read_bytes() == b"half"
    run(tmp_path, line("none"), adapter)
    assert AutoModelForCausalLM.from_pretrained(earlier) is not None
    assert not (tmp_path / ".candidates").exists()


def test_base_in_shards_gives_the_same_weights_as_in_one_file(loud_base: Path, adapter: Made, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(loud_base, dtype=torch.bfloat16).save_pretrained(
        sharded, max_shard_size="60KB"
    )
    assert len(list(sharded.glob("*.safetensors"))) > 2
    changes = read_changes(adapter.folder / "adapter")
    for name, folder in (("one", loud_base), ("many", sharded)):
        build(folder, changes, tmp_path / name, dtype=torch.bfloat16)
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_wishes_that_cannot_be_are_named_at_once() -> None:
    config = MergeConfig(
        **{**CONFIG, "choose": "best", "candidates": ["magic"], "dtype": "int4", "loss_rows": 0, "measure_tokens": 0}
    )
    assert len(list(config.problems())) == 5
