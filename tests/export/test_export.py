"""Every export is opened by its own runtime and compared; what differs is not kept."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ExportError, ModelError
from finetune.eval import AnswerScorer
from finetune.export import ExportConfig, load
from finetune.export.parity import Expected, compare, last_logits
from finetune.export.stage import WRITERS
from finetune.inference.adapted import load_adapted_model
from finetune.jsonable import from_json, to_jsonable
from finetune.products import ExportResult, Exports
from tests.fixtures.artifacts import Line, Made
from tests.fixtures.exports import BOUNDS, Facts


@pytest.fixture(scope="module")
def exports(
    run: Callable[..., Exports], line: Callable[..., Line], tmp_path_factory: pytest.TempPathFactory
) -> Exports:
    folder = tmp_path_factory.mktemp("run")
    (folder / "model").mkdir()
    product = {"folder": str(line().spec.base.folder)}
    (folder / "model" / "manifest.json").write_text(json.dumps({"product": product}))
    return run(folder / "export", "card", "adapter", "safetensors", rows=4)


def test_each_export_passed_in_its_own_runtime(exports: Exports) -> None:
    assert [one.format for one in exports.exports] == ["adapter", "safetensors", "card"]
    adapter, merged, _ = exports.exports
    assert "peft" in adapter.parity.runtime
    assert "peft" not in merged.parity.runtime
    assert merged.parity.max_logit_difference < 1e-3
    assert merged.parity.rows == 3
    assert abs(merged.parity.loss_difference.difference) < 1e-3
    assert merged.parity.loss > 0
    assert all(one.parity.chats == 4 and one.parity.passed for one in (adapter, merged))
    listed = {"adapter", "safetensors", "adapter.answers.jsonl", "safetensors.answers.jsonl", "README.md"}
    assert {file.name for file in exports.folder.iterdir()} == listed


def test_loss_of_an_export_is_compared_with_the_evaluations_on_the_same_rows(
    exports: Exports, scorer: AnswerScorer
) -> None:
    for one, name in zip(exports.exports, ("adapter", "merged"), strict=False):
        losses = scorer.losses(name, rows=3)
        assert one.parity.tokens == sum(row.tokens for row in losses)
        assert one.parity.model_loss == pytest.approx(sum(row.loss for row in losses) / one.parity.tokens)


def test_answers_of_an_export_are_scored_against_the_models_to_the_same_prompts(exports: Exports) -> None:
    for one, model in zip(exports.exports, ("adapter", "merged"), strict=False):
        answers = one.parity.answers
        assert (answers.rows, answers.model.name, answers.model.mean_tokens) == (4, model, 2)
        assert answers.metrics.keys() == {"exact_match", "label_known"}
        assert answers.changes["stop_rate"].difference == answers.stop_rate - 1
        lines = [
            json.loads(text)
            for text in (exports.folder / f"{Path(one.path).name}.answers.jsonl").read_text().splitlines()
        ]
        assert [line["row"] for line in lines] == [0, 1, 2, 3]
        assert lines[0]["scores"].keys() == answers.metrics.keys()


def test_every_snippet_of_the_card_runs(exports: Exports) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (exports.folder / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 3
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for code in blocks[1:2]:  # the parity check has run the other two as they stand
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=exports.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_manifest_leaves_out_what_an_export_does_not_have(exports: Exports) -> None:
    adapter, merged, card = to_jsonable(exports)["exports"]
    assert list(card) == ["format", "path", "bytes", "sha256", "parity"]
    assert card["parity"] == {}
    assert "cost" not in merged["parity"]
    assert list(adapter["parity"])[-4:] == ["tokens", "model_loss", "loss_difference", "answers"]
    assert from_json(Exports, json.loads(json.dumps(to_jsonable(exports)))) == exports


def test_card_states_base_quantization_metrics_and_merge(exports: Exports) -> None:
    card = (exports.folder / "adapter" / "README.md").read_text()
    for text in (
        "4-bit NF4 (double quantization)",
        "0.500 [0.400, 0.600]",
        "| dequantized | 0.00010 |",
        "Merged: dequantized + adapter (kept) | 1.0000 [0.9000, 1.1000]",
        "4 rows: exact_match",
        "| Step | exact_match | general_loss |",
        "Data: `rows.jsonl`: 90 rows",
        "Licence",
        "library_name: peft",
    ):
        assert text in card


def test_card_states_what_a_format_could_not_do() -> None:
    from finetune.export.card import _files

    one = ExportResult(
        path="export/gguf_q4_k_m", format="gguf", bytes=1, sha256="a" * 64, notes=["rows of 576 are in q5_0"]
    )
    assert list(_files([one]))[-1] == "- `gguf_q4_k_m`: rows of 576 are in q5_0"


def test_adapter_folder_holds_all_that_a_loader_needs(exports: Exports) -> None:
    record = json.loads((exports.folder / "adapter" / "finetune.json").read_text())
    assert record["quantization"]["spec"] == {"method": "nf4", "double": True, "blocksize": 64, "keep": []}
    assert record["base"]["files"].keys() == {"model.safetensors"}
    assert record["tokenizer"]["eos"] == {"id": 2, "ends_an_answer": [2]}
    assert record["tokenizer"]["pad"]["is_an_end_token"] is False
    assert len(record["tokenizer"]["template_sha256"]) == 64


def test_loader_rebuilds_the_trained_model(exports: Exports, line: Callable[..., Line], adapter: Made) -> None:
    parts = line()
    folder = adapter.folder / "adapter"
    trained = load_adapted_model(parts.spec, folder)
    loaded, tokenizer = load(exports.folder.parent)
    prompt = [1, 40, 50, 60]
    assert (last_logits(loaded, prompt) == last_logits(trained, prompt)).all()
    assert tokenizer.chat_template


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_arrives_in_the_dtype_it_was_saved_in(
    line: Callable[..., Line], adapter: Made, tmp_path: Path, dtype: torch.dtype
) -> None:
    parts = line()
    shutil.copytree(adapter.folder / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    saved = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(saved, file)
    graph = load_adapted_model(parts.spec, tmp_path / "adapter")
    arrived = {
        name.replace(".default", ""): parameter for name, parameter in graph.named_parameters() if "lora_" in name
    }
    assert arrived.keys() == saved.keys()
    assert all(arrived[name].dtype == dtype and torch.equal(arrived[name], tensor) for name, tensor in saved.items())


def test_loader_opens_the_merged_model(exports: Exports, merged: Facts) -> None:
    from transformers import AutoModelForCausalLM

    loaded, _ = load(exports.folder / "safetensors")
    plain = AutoModelForCausalLM.from_pretrained(merged.folder / "model", dtype=torch.bfloat16)
    assert (last_logits(loaded, [1, 40, 50]) == last_logits(plain, [1, 40, 50])).all()


def test_adapter_on_another_machine_asks_for_its_base_and_takes_it(
    exports: Exports, line: Callable[..., Line], tmp_path: Path
) -> None:
    shutil.copytree(exports.folder / "adapter", tmp_path / "adapter")
    base = tmp_path / "moved" / "base"
    shutil.copytree(line().spec.base.folder, base)
    with pytest.raises(
        ModelError, match=r"a folder of the machine that trained it .* finetune.load\(..., base=<folder>"
    ):
        load(tmp_path / "adapter")
    loaded, _ = load(tmp_path / "adapter", base=base)
    original, _ = load(exports.folder / "adapter")
    assert (last_logits(loaded, [1, 40, 50]) == last_logits(original, [1, 40, 50])).all()


def test_flipped_bytes_of_an_export_are_refused_although_size_and_time_are_the_same(
    exports: Exports, tmp_path: Path
) -> None:
    shutil.copytree(exports.folder / "safetensors", tmp_path / "safetensors")
    load(tmp_path)
    file = tmp_path / "safetensors" / "model.safetensors"
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ModelError, match="weights are not those that were exported"):
        load(tmp_path)


def test_exports_hold_no_folder_of_this_machine(exports: Exports, line: Callable[..., Line]) -> None:
    folders = {str(line().spec.base.folder.parent).encode(), str(exports.folder.parent).encode()}
    files = [file for file in exports.folder.rglob("*") if file.is_file() and file.suffix != ".safetensors"]
    assert not {file for file in files if any(folder in file.read_bytes() for folder in folders)}
    settings = json.loads((exports.folder / "adapter" / "adapter_config.json").read_text())
    record = json.loads((exports.folder / "adapter" / "finetune.json").read_text())
    assert settings["base_model_name_or_path"] == record["base"]["name"] == line().spec.base.public_name
    assert len(record["base"]["sha256"]) == 64


@pytest.mark.parametrize("name", ["adapter", "safetensors"])
def test_tokenizer_of_an_export_is_in_the_form_that_transformers_4_reads(exports: Exports, name: str) -> None:
    """4.57.1 opened these files; it refuses version 5's: "Tokenizer class TokenizersBackend does not exist"."""
    settings = json.loads((exports.folder / name / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["chat_template"] == (exports.folder / name / "chat_template.jinja").read_text()
    assert not settings.keys() & {"extra_special_tokens", "local_files_only", "is_local"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["base"].update(sha256="0" * 64), "is not the one that the adapter was trained on"),
        (lambda record: record.update(weights_sha256="0" * 64), "weights are not those that were exported"),
        (lambda record: record["tokenizer"].update(template_sha256="0" * 64), "its template_sha256 changed"),
        (lambda record: record.update(schema=1), "another version of finetune"),
        (
            lambda record: record["model"].update(old=1),
            "another version of finetune, which differs in the settings old",
        ),
        (lambda record: record["quantization"]["settings"].pop("method"), "differs in the settings method; export"),
    ],
)
def test_loader_refuses_what_does_not_match(
    exports: Exports, line: Callable[..., Line], tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    shutil.copytree(exports.folder / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "finetune.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with pytest.raises(ModelError, match=message):
        load(tmp_path, base=line().spec.base.folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "adapter_config.json",
            lambda text: text.replace('"lora_alpha": ', '"lora_alpha": 1'),
            "adapter_config.json changed",
        ),
        ("tokenizer.json", None, "tokenizer.json changed or missing"),
        ("tokenizer_config.json", lambda text: text + " ", "tokenizer_config.json changed"),
        ("finetune.json", lambda text: text[:100], "finetune.json is damaged"),
    ],
)
def test_loader_refuses_files_that_are_not_the_exported_ones(
    exports: Exports, tmp_path: Path, name: str, content: Callable[[str], str] | None, message: str
) -> None:
    shutil.copytree(exports.folder / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / name
    if content:
        file.write_text(content(file.read_text()))
    else:
        file.unlink()
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_loader_of_a_bare_folder_names_what_is_missing(adapter: Made) -> None:
    with pytest.raises(ModelError, match=r"holds no finetune.json"):
        load(adapter.folder / "adapter")


def test_merged_model_with_another_template_is_not_kept(
    run: Callable[..., Exports], merged: Facts, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(merged.folder, other)
    template = other / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|im_end|> "))
    (tmp_path / "export" / "safetensors").mkdir(parents=True)
    (tmp_path / "export" / "safetensors" / "good").write_text("an earlier export")
    with pytest.raises(ExportError, match="its tokenizer writes the chat"):
        run(tmp_path / "export", "safetensors", from_merged=Facts(folder=other))
    assert (tmp_path / "export" / "safetensors" / "good").is_file()


def test_export_beyond_its_bound_is_refused(tmp_path: Path) -> None:
    import numpy as np

    wanted = Expected(
        chats=[],
        chat_tokens=[],
        prompts=[[1]],
        logits=[np.zeros((1, 4), dtype=np.float32)],
        rows=[],
        losses=[],
        stopped=False,
        ending=[1],
        dtype="float32",
    )
    file = tmp_path / "logits.npz"
    np.savez(file, prompt_0=np.array([[0, 0, 0, 1.0]], dtype=np.float32))
    got = {"chat_tokens": [], "losses": [], "stopped": True, "runtime": "test"}
    with pytest.raises(ExportError, match=r"logits by up to 1.0000"):
        compare("gguf", wanted, got, file, config=ExportConfig(**{**BOUNDS, "format": "safetensors"}), seed=1)
    wide = ExportConfig(**{**BOUNDS, "format": "safetensors", "max_logit_difference": 2, "max_kl": 1})
    found = compare("gguf", wanted, got, file, config=wide, seed=1)
    p = np.exp([0, 0, 0, 1.0]) / np.exp([0, 0, 0, 1.0]).sum()
    assert found.kl == pytest.approx(float((0.25 * np.log(0.25 / p)).sum()), abs=1e-6)


@pytest.fixture
def interrupted(run: Callable[..., Exports], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stage that ended after its first export."""

    def fail(*_: Any) -> None:
        raise ExportError("no disk")

    with monkeypatch.context() as patch:
        patch.setitem(WRITERS, "safetensors", fail)
        with pytest.raises(ExportError, match="no disk"):
            run(tmp_path / "export", "adapter", "safetensors", "card")
    return tmp_path / "export"


def refuse(*_: Any) -> None:
    raise AssertionError("the adapter is exported again")


def test_a_finished_export_of_an_interrupted_stage_is_not_made_again(
    run: Callable[..., Exports], interrupted: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WRITERS, "adapter", refuse)
    again = run(interrupted, "adapter", "safetensors", "card")
    assert [one.format for one in again.exports] == ["adapter", "safetensors", "card"]
    assert again.exports[0].sha256 == exports.exports[0].sha256
    assert again.exports[0].parity is not None
    assert "PeftModel.from_pretrained" in (interrupted / "README.md").read_text()
    assert not (interrupted / ".finished").exists()


@pytest.mark.parametrize("change", ["settings", "bytes", "missing"])
def test_a_finished_export_that_would_be_another_is_made_again(
    run: Callable[..., Exports], interrupted: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    weights = interrupted / "adapter" / "adapter_model.safetensors"
    if change == "bytes":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    if change == "missing":
        shutil.rmtree(interrupted / "adapter")
    monkeypatch.setitem(WRITERS, "adapter", refuse)
    with pytest.raises(AssertionError, match="exported again"):
        run(interrupted, "adapter", "safetensors", **({"max_new_tokens": 7} if change == "settings" else {}))


def test_all_invalid_settings_are_named_at_once() -> None:
    config = ExportConfig(
        format="pickle", logit_rows=-1, loss_rows=0, max_logit_difference=0.1, max_kl=-1.0, max_new_tokens=0
    )
    assert len(list(config.problems())) == 4
