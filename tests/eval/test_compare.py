"""Two runs on the same rows: what differs, on how many rows, and what cannot be compared."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import ConfigError, EvalError
from finetune.eval import EvalConfig, evaluate
from finetune.eval.compare import compare
from finetune.merge.adapter_deltas import read_changes
from finetune.merge.candidates import build
from finetune.products import Scores
from finetune.report.compare import show_comparison
from finetune.run import RunFolder
from tests.fixtures.artifacts import Line, Made, make_adapter

CONFIG: dict[str, Any] = {
    "rows": 6,
    "loss_rows": 8,
    "max_new_tokens": 6,
    "batch_rows": 6,
    "batch_tokens": 512,
    "metrics": ["token_f1", "exact_match"],
    "bootstrap_samples": 100,
}


@pytest.fixture(scope="module")
def runs(
    loud_base: Path, line: Callable[..., Line], adapter: Made, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two run folders, ``a`` and ``b``: the same base and rows, other adapters."""
    root, parts = tmp_path_factory.mktemp("outputs"), line()
    adapters = {"a": adapter, "b": make_adapter(loud_base, root / "other", size=0.1, seed=5)}
    for name, trained in adapters.items():
        folder = RunFolder(root / name)
        shutil.copytree(parts.data.folder, folder.path / "data")
        build(
            loud_base, read_changes(trained.folder / "adapter"), root / f"merged-{name}" / "model", dtype=torch.bfloat16
        )
        products: dict[str, Any] = {
            "adapter": trained,
            "merged": Made(folder=root / f"merged-{name}"),
            "data": Made(folder=folder.path / "data"),
        }
        score = partial(evaluate, EvalConfig(**CONFIG), spec=parts.spec, seed=1, **products)
        folder.stage("eval", Scores, lambda out, score=score: score(folder=out), key={"eval": EvalConfig(**CONFIG)})
    return root / "a", root / "b"


@pytest.fixture
def pair(runs: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Copies that a test may change. Some answers of ``b`` are said to be right: the tiny models get none."""
    one, two = (Path(shutil.copytree(run, tmp_path / run.name)) for run in runs)

    def some_right(sample: dict[str, Any]) -> None:
        if sample["row"] in (1, 4):
            sample["merged"], sample["scores"]["merged"] = sample["reference"], {"token_f1": 1.0, "exact_match": 1.0}

    change_samples(two, some_right)
    return one, two


def change_samples(run: Path, change: Callable[[dict[str, Any]], None], *, keep: int = 6) -> None:
    file = run / "eval" / "samples.jsonl"
    samples = [json.loads(text) for text in file.read_text().splitlines()][:keep]
    for sample in samples:
        change(sample)
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def change_config(run: Path, **settings: Any) -> None:
    file = run / "eval" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["key"].update({f"eval.{name}": value for name, value in settings.items()})
    file.write_text(json.dumps(manifest))


def test_differences_are_those_of_the_two_evaluations(pair: tuple[Path, Path]) -> None:
    one, two = pair
    found = compare(one, two, seed=1)
    levels = [
        json.loads((run / "eval" / "manifest.json").read_text())["product"]["artifacts"]["adapter"]["loss"]
        for run in pair
    ]
    loss = found["artifacts"]["adapter"]["figures"]["loss"]
    assert loss["levels"] == pytest.approx(levels)
    assert loss["difference"] == pytest.approx(levels[1] - levels[0])
    assert loss["low"] < loss["difference"] < loss["high"]
    assert found["artifacts"]["merged"]["figures"]["exact_match"]["difference"] == pytest.approx(2 / 6)
    assert found["rows"] == {"answers": {"shared": 6, "only": [0, 0]}, "loss": {"shared": 8, "only": [0, 0]}}
    assert not found["remarks"]


def test_the_same_base_is_the_same_in_both(pair: tuple[Path, Path]) -> None:
    figures = compare(*pair, seed=1)["artifacts"]["base"]["figures"]
    assert set(figures) == {"loss", "perplexity", "token_f1", "exact_match"}
    assert all(found["difference"] == found["low"] == found["high"] == 0 for found in figures.values())


def add_general(run: Path, *, tokens: int) -> None:
    change_config(run, general_text="general.txt")
    for number, file in enumerate(sorted((run / "eval").glob("*.rows.jsonl"))):
        with open(file, "a") as handle:
            handle.write(json.dumps({"general": [[4.0 + number, 2, 1], [2.0, tokens, 1]]}) + "\n")


def test_loss_on_the_same_general_text_is_compared(pair: tuple[Path, Path]) -> None:
    one, two = pair
    for run in pair:
        add_general(run, tokens=2)
    assert compare(one, two, seed=1)["artifacts"]["base"]["figures"]["general_loss"]["levels"] == [1.75, 1.75]


def test_loss_on_another_general_text_is_left_out_and_said(pair: tuple[Path, Path]) -> None:
    one, two = pair
    add_general(one, tokens=2)
    add_general(two, tokens=3)
    found = compare(one, two, seed=1)
    assert "general_loss" not in found["artifacts"]["base"]["figures"]
    assert found["remarks"] == ["general_loss: not compared, since eval.general_text is not the same text in both"]


def test_rows_that_changed_most_come_first_with_both_answers(pair: tuple[Path, Path]) -> None:
    changed = compare(*pair, seed=1)["artifacts"]["merged"]["changed"]
    assert [row["answers"][1] == row["reference"] for row in changed[:2]] == [True, True]
    assert changed[0]["scores"][1] == {"token_f1": 1.0, "exact_match": 1.0}
    assert "Wake me at" in changed[0]["prompt"]


def test_rows_are_matched_by_what_they_say_and_not_by_their_place(pair: tuple[Path, Path]) -> None:
    one, two = pair
    before = compare(one, two, seed=1)["artifacts"]["merged"]["figures"]["exact_match"]
    file = two / "eval" / "samples.jsonl"
    file.write_text("".join(text + "\n" for text in reversed(file.read_text().splitlines())))
    assert compare(one, two, seed=1)["artifacts"]["merged"]["figures"]["exact_match"] == before


def test_rows_only_in_one_are_counted_and_said(pair: tuple[Path, Path]) -> None:
    one, two = pair
    change_samples(two, lambda sample: None, keep=4)
    found = compare(one, two, seed=1)
    assert found["rows"]["answers"] == {"shared": 4, "only": [2, 0]}
    assert found["remarks"] == ["answers: 4 rows are in both; 2 only in a and 0 only in b are left out"]
    assert found["artifacts"]["merged"]["figures"]["exact_match"]["difference"] == pytest.approx(1 / 4)


def test_another_tokenizer_leaves_out_the_loss_and_says_so(pair: tuple[Path, Path]) -> None:
    from datasets import load_from_disk

    one, two = pair
    folder = two / "data" / "heldout"
    rows = load_from_disk(str(folder)).map(
        lambda row: {"input_ids": [token + 1 for token in row["input_ids"]]}, keep_in_memory=True
    )
    shutil.move(folder, two / "before")
    rows.save_to_disk(str(folder))
    found = compare(one, two, seed=1)
    assert set(found["artifacts"]["merged"]["figures"]) == {"token_f1", "exact_match"}
    assert found["remarks"][0].startswith(
        "loss: not compared, since no row is in both (another tokenizer, template or data)"
    )


def test_without_answers_rows_are_ranked_by_their_loss(pair: tuple[Path, Path]) -> None:
    for run in pair:
        change_samples(run, lambda sample: None, keep=0)
    merged = compare(*pair, seed=1)["artifacts"]["merged"]
    sizes = [abs(row["scores"][1]["loss"] - row["scores"][0]["loss"]) for row in merged["changed"]]
    assert set(merged["figures"]) == {"loss", "perplexity"}
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0


def test_runs_that_share_no_row_are_refused(pair: tuple[Path, Path]) -> None:
    one, two = pair
    change_samples(two, lambda sample: sample.update(prompt="other " + sample["prompt"]))
    rows = (two / "eval" / "manifest.json").read_text().replace('"loss_rows": 8', '"loss_rows": 0')
    (two / "eval" / "manifest.json").write_text(rows)
    for file in (two / "eval").glob("*.rows.jsonl"):
        file.write_text("")
    with pytest.raises(EvalError, match="it shares no held-out row with"):
        compare(one, two, seed=1)


@pytest.mark.parametrize(("setting", "value"), [("metrics", ["label"]), ("max_new_tokens", 7)])
def test_other_metrics_or_limits_are_refused_by_name(pair: tuple[Path, Path], setting: str, value: Any) -> None:
    one, two = pair
    change_config(two, **{setting: value})
    with pytest.raises(
        EvalError, match=rf"eval\.{setting} is .* in a and .* in b, so their scores do not mean the same"
    ):
        compare(one, two, seed=1)


def test_unfinished_evaluation_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"holds no finished evaluation; run `finetune eval run.name=c` first"):
        compare(pair[0], tmp_path / "c", seed=1)


def test_a_run_is_not_compared_with_itself(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="is the run itself"):
        compare(pair[0], pair[0], seed=1)


def test_page_holds_figures_and_answers_and_asks_for_nothing(pair: tuple[Path, Path], capsys: Any) -> None:
    one, two = pair
    change_samples(two, lambda sample: sample.update(merged=f"<script>{'long ' * 30}</script>"))
    page = one / "eval" / "compare-b.html"
    show_comparison(compare(one, two, seed=1), page)
    text, printed = page.read_text(), capsys.readouterr().out
    assert json.loads((one / "eval" / "compare-b.json").read_text())["runs"] == ["a", "b"]
    assert "long " * 30 in text
    assert text.count("<script") == 1  # that of the charts
    assert not any(scheme in text for scheme in ("http:", "https:"))
    assert "+0.3333" in text
    assert "+0.3333" in printed
    assert all(len(line) < 200 for line in printed.splitlines())
