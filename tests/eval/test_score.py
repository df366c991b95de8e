"""Four artifacts on the same rows: figures, differences, samples, gates, and going on where it stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import EvalError
from finetune.eval import EvalConfig, evaluate
from finetune.inference.losses import mean_loss, row_losses
from finetune.inference.rows import read_rows
from finetune.jsonable import from_json, to_jsonable
from finetune.merge.adapter_deltas import read_changes
from finetune.merge.candidates import build
from finetune.products import Scores
from tests.fixtures.artifacts import Line, Made

CONFIG: dict[str, Any] = {
    "rows": 4,
    "loss_rows": 8,
    "max_new_tokens": 6,
    "batch_rows": 3,
    "batch_tokens": 256,
    "metrics": ["exact_match", "token_f1", "label_known"],
    "bootstrap_samples": 50,
}


@pytest.fixture(scope="module")
def merged(loud_base: Path, adapter: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("merged")
    build(loud_base, read_changes(adapter.folder / "adapter"), folder / "model", dtype=torch.bfloat16)
    return Made(folder=folder)


@pytest.fixture(scope="module")
def run(line: Callable[..., Line], adapter: Made, merged: Made) -> Callable[..., Scores]:
    def run(folder: Path, parts: Line | None = None, **settings: Any) -> Scores:
        parts = parts or line()
        products: dict[str, Any] = {"adapter": adapter, "merged": merged, "data": parts.data}
        return evaluate(EvalConfig(**{**CONFIG, **settings}), folder=folder, spec=parts.spec, seed=1, **products)

    return run


@pytest.fixture(scope="module")
def scores(run: Callable[..., Scores], tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return run(tmp_path_factory.mktemp("eval"))


def test_loss_of_the_base_is_that_of_plain_transformers(scores: Scores, line: Callable[..., Line]) -> None:
    from transformers import AutoModelForCausalLM

    parts = line()
    plain = AutoModelForCausalLM.from_pretrained(parts.spec.base.folder, dtype=torch.bfloat16)
    rows = read_rows(parts.data.folder / "heldout", limit=8)
    assert scores.artifacts["base"].loss == pytest.approx(
        mean_loss(row_losses(plain, rows, batch_tokens=256)), abs=1e-4
    )


def test_changes_are_differences_of_the_levels(scores: Scores) -> None:
    for change, (before, after) in {"quantization": ("base", "base_quantized"), "merge": ("adapter", "merged")}.items():
        expected = scores.artifacts[after].loss - scores.artifacts[before].loss
        assert scores.changes[change]["loss"].difference == pytest.approx(expected, abs=1e-9)
    parts = sum(scores.changes[name]["loss"].difference for name in ("quantization", "tuning", "merge"))
    assert scores.changes["total"]["loss"].difference == pytest.approx(parts, abs=1e-9)


def test_each_sample_has_the_answer_of_every_artifact(scores: Scores) -> None:
    samples = [json.loads(text) for text in (scores.folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["row"] for sample in samples] == [0, 1, 2, 3]
    assert set(samples[0]) == {"row", "prompt", "reference", "base", "base_quantized", "adapter", "merged", "scores"}
    assert set(samples[0]["scores"]["merged"]) == set(CONFIG["metrics"])


def test_product_survives_json(scores: Scores) -> None:
    content = json.loads(json.dumps(to_jsonable(scores)))
    assert content["artifacts"]["adapter"]["metrics"]["exact_match"].keys() == {"value", "low", "high"}
    assert content["changes"]["total"]["loss"].keys() == {"difference", "low", "high"}
    assert not {"general_loss", "harness"} & content["artifacts"]["adapter"].keys()
    assert from_json(Scores, content) == scores


def test_interrupted_stage_goes_on_without_measuring_again(
    scores: Scores, run: Callable[..., Scores], tmp_path: Path, capsys: Any
) -> None:
    for name in ("base", "base_quantized", "adapter"):
        (tmp_path / f"{name}.rows.jsonl").write_bytes((scores.folder / f"{name}.rows.jsonl").read_bytes())
    half = (scores.folder / "merged.rows.jsonl").read_text()
    (tmp_path / "merged.rows.jsonl").write_text(half[:-20])
    again = run(tmp_path)
    assert capsys.readouterr().out.count("reusing earlier results") == 3
    assert again.artifacts == scores.artifacts


def test_other_limit_on_answers_measures_again(
    scores: Scores, run: Callable[..., Scores], tmp_path: Path, capsys: Any
) -> None:
    for name in ("base", "base_quantized", "adapter", "merged"):
        (tmp_path / f"{name}.rows.jsonl").write_bytes((scores.folder / f"{name}.rows.jsonl").read_bytes())
    run(tmp_path, max_new_tokens=3)
    assert "reusing earlier results" not in capsys.readouterr().out


def test_missed_gate_is_named_with_its_figure(run: Callable[..., Scores], scores: Scores, tmp_path: Path) -> None:
    for file in scores.folder.glob("*.rows.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    gated = run(tmp_path, gate={"adapter.loss": 0.5, "merged.exact_match": 0.0, "tuning.perplexity": -1e9})
    assert [sentence.split(" is ")[0] for sentence in gated.missed] == [
        "eval.gate: adapter.loss",
        "eval.gate: tuning.perplexity",
    ]


def test_unquantized_base_is_measured_once(
    run: Callable[..., Scores], line: Callable[..., Line], tmp_path: Path
) -> None:
    scores = run(tmp_path, line("none"), rows=0, metrics=[])
    assert scores.artifacts["base"] == scores.artifacts["base_quantized"]
    assert scores.changes["quantization"]["loss"].difference == 0


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("general") / "text.txt"
    file.write_text("What is the capital of France?\n\nWake me at seven on Monday, please.\n\n0 1 2 3 4 5 6 7 8 9")
    return file


def test_general_text_is_measured_beside_the_task(
    run: Callable[..., Scores], line: Callable[..., Line], text: Path, tmp_path: Path, capsys: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = {"general_text": str(text), "rows": 0, "metrics": [], "gate": {"tuning.general_loss": -1e9}}
    scores = run(tmp_path, **config)
    parts = line()
    plain: Any = AutoModelForCausalLM.from_pretrained(parts.spec.base.folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(parts.spec.base.folder)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(text.read_text().split("\n\n"))["input_ids"]]
    level = {name: figures.general_loss for name, figures in scores.artifacts.items()}
    assert level["base"].value == pytest.approx(mean_loss(row_losses(plain, rows, batch_tokens=256)), abs=1e-4)
    change = scores.changes["tuning"]["general_loss"]
    assert change.difference == pytest.approx(level["adapter"].value - level["base_quantized"].value, abs=1e-9)
    assert change.low <= change.difference <= change.high
    assert scores.missed[0].startswith("eval.gate: tuning.general_loss is")
    capsys.readouterr()
    assert run(tmp_path, **config).artifacts == scores.artifacts
    assert capsys.readouterr().out.count("reusing earlier results") == 4


def test_other_general_text_measures_again(run: Callable[..., Scores], text: Path, tmp_path: Path, capsys: Any) -> None:
    config = {"rows": 0, "metrics": []}
    without = run(tmp_path, **config)
    assert without.artifacts["base"].general_loss is None
    assert run(tmp_path, general_text=str(text), **config).artifacts["base"].general_loss is not None
    assert "reusing earlier results" not in capsys.readouterr().out


def test_code_is_run_with_its_rows_tests(run: Callable[..., Scores], line: Callable[..., Line], tmp_path: Path) -> None:
    import dataclasses

    from datasets import load_from_disk

    parts = line("none")
    heldout = load_from_disk(str(parts.data.folder / "heldout"))
    heldout.add_column("tests", ["assert False"] + ["pass"] * (len(heldout) - 1)).save_to_disk(
        str(tmp_path / "data" / "heldout")
    )
    (tmp_path / "eval").mkdir()
    scores = run(
        tmp_path / "eval",
        dataclasses.replace(parts, data=Made(folder=tmp_path / "data")),
        metrics=["pass_at_1", "code_valid"],
    )
    samples = [
        json.loads(text)["scores"]["base"] for text in (scores.folder / "samples.jsonl").read_text().splitlines()
    ]
    assert samples[0]["pass_at_1"] == 0
    assert all(sample["pass_at_1"] <= sample["code_valid"] for sample in samples)


def test_rows_without_tests_are_refused_before_a_model_is_loaded(run: Callable[..., Scores], tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="pass_at_1 needs 'tests' in every held-out row, and 4 have none"):
        run(tmp_path, metrics=["pass_at_1"])


def test_missing_heldout_split_is_said(run: Callable[..., Scores], line: Callable[..., Line], tmp_path: Path) -> None:
    import dataclasses

    with pytest.raises(EvalError, match="nothing to evaluate on"):
        run(tmp_path, dataclasses.replace(line(), data=Made(folder=tmp_path)))


def test_wishes_that_cannot_be_are_named_at_once() -> None:
    config = EvalConfig(
        **{**CONFIG, "metrics": ["bleurt"], "loss_rows": 0, "gate": {"adaptor.loss": 1.0, "adapter.los": 1.0}}
    )
    assert len(list(config.problems())) == 4
    absent = EvalConfig(**{**CONFIG, "general_text": "no/such/file.txt"})
    assert "no/such/file.txt does not exist" in next(absent.problems())
    ungiven = EvalConfig(**{**CONFIG, "gate": {"tuning.general_loss": 0.1}})
    assert "needs general text" in next(ungiven.problems())


def test_tasks_of_lm_eval_are_put_to_every_artifact_and_kept(
    run: Callable[..., Scores], tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("lm_eval")
    from finetune.eval.harness import HarnessConfig
    from tests.fixtures.tasks import write_task

    (tmp_path / "tasks").mkdir()
    write_task(tmp_path / "tasks", "one")
    config = HarnessConfig(tasks=["one"], include_path=str(tmp_path / "tasks"), limit=6, batch_rows=4)
    scores = run(tmp_path, harness=config)
    assert all(one.harness.tasks["one"].rows == 6 for one in scores.artifacts.values())
    again = run(tmp_path, harness=config)
    assert capsys.readouterr().out.count("reusing earlier results") == 4
    assert again.artifacts == scores.artifacts


def test_a_base_that_takes_too_long_is_left_out_and_every_page_says_so(
    run: Callable[..., Scores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny base is taken for one with a million times its weights."""
    from finetune.inference.artifacts import collect_artifacts, describe_conditions
    from finetune.report.summary import headline

    monkeypatch.setattr("finetune.inference.dense.stored_elements", lambda folder: 10**12)
    scores = run(tmp_path, batch_rows=1)
    assert list(scores.artifacts) == ["base_quantized", "adapter", "merged"]
    assert list(scores.changes) == ["tuning", "merge"]
    assert "are read again for each of" in scores.left_out["base"]
    assert "base is not measured" in " ".join(capsys.readouterr().out.split())
    content = to_jsonable(scores)
    assert next(iter(collect_artifacts(content, None, [])))["title"] == "Base, quantized"
    assert "Not measured: base model" in next(describe_conditions(content, None))
    compared = headline(content)
    assert compared is not None
    assert (compared["from"], compared["artifact"]) == ("base_quantized", "adapter")
    assert compared["difference"] == content["changes"]["tuning"][compared["metric"]]
    sample = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert "base" not in sample
    (tmp_path / "kept").mkdir()
    kept = run(tmp_path / "kept", batch_rows=1, gate={"base.loss": 1e9})
    assert list(kept.artifacts) == ["base", "base_quantized", "adapter", "merged"]
    assert kept.artifacts["merged"] == scores.artifacts["merged"]


def test_only_named_artifacts_are_measured(run: Callable[..., Scores], scores: Scores, tmp_path: Path) -> None:
    named = run(tmp_path, artifacts=["adapter", "merged"])
    assert named.artifacts == {name: scores.artifacts[name] for name in ("adapter", "merged")}
    assert set(named.left_out) == {"base", "base_quantized"}


def test_answers_do_not_depend_on_the_batch(run: Callable[..., Scores], scores: Scores, tmp_path: Path) -> None:
    assert run(tmp_path, batch_rows="auto").artifacts["adapter"].metrics == scores.artifacts["adapter"].metrics


def test_artifacts_and_batches_that_cannot_be_are_named() -> None:
    config = EvalConfig(**{**CONFIG, "batch_rows": 0, "artifacts": ["merged"], "gate": {"total.loss": 0.0}})
    problems = list(config.problems())
    assert any("eval.batch_rows must be auto or a whole number of at least 1; got 0" in text for text in problems)
    assert any("eval.artifacts must be auto, or a list of" in text for text in problems)
    config = EvalConfig(**{**CONFIG, "artifacts": ["adapter", "merged"], "gate": {"total.loss": 0.0}})
    assert "eval.gate: 'total.loss' needs base, which eval.artifacts leaves out" in list(config.problems())
