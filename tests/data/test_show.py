"""The summary, the preview page, the fate of one row, and the cache that makes the next run start fast."""

import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.data import explain
from finetune.data.config import SourceConfig
from finetune.data.show import explain_row
from finetune.data.show.documents import SplitFile
from finetune.errors import DataError
from finetune.products import PreparedData
from tests.data.helpers import pair, split, write_jsonl

ROWS = [pair(f"What is {number}?", f"It is <b>{number}</b>.") for number in range(12)]


def test_folder_opens_in_datasets(run: Callable[..., PreparedData]) -> None:
    import datasets

    product = run(ROWS, heldout_rows=3)
    train, out = (datasets.load_from_disk(str(product.folder / name)) for name in ("train", "heldout"))
    assert train.column_names == ["input_ids", "labels", "seq_lengths", "rows"]
    assert out.column_names == ["input_ids", "labels", "seq_lengths", "rows", "prompt_ids", "reference", "row", "chat"]
    assert (len(train), len(out)) == (9, 3)
    assert train._fingerprint != out._fingerprint


def test_held_out_folder_is_there_but_empty_without_held_out_rows(run: Callable[..., PreparedData]) -> None:
    import datasets

    assert len(datasets.load_from_disk(str(run(ROWS).folder / "heldout"))) == 0


def test_product_survives_json(run: Callable[..., PreparedData]) -> None:
    product = run(ROWS)
    fields = {name: value for name, value in dataclasses.asdict(product).items() if name != "folder"}
    assert PreparedData(folder=product.folder, **json.loads(json.dumps(fields))) == product


def test_rendering_has_what_serving_must_do(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    rendering = json.loads((run(ROWS).folder / "rendering.json").read_text())
    assert rendering["template"] == tokenizer.chat_template
    assert rendering["end_of_turn_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_preview_marks_the_trained_text_and_escapes_the_rest(run: Callable[..., PreparedData]) -> None:
    page = (run(ROWS).folder / "preview.html").read_text()
    assert any(
        f'<mark>It is &lt;b&gt;{number}&lt;/b&gt;.</mark><mark class="end">&lt;|im_end|&gt;</mark>' in page
        for number in range(12)
    )
    assert "ends a turn, and is trained on in 3 of these 3." in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<script") == 1


def test_examples_for_the_report_are_the_first_of_the_preview(run: Callable[..., PreparedData]) -> None:
    folder = run(ROWS).folder
    examples = json.loads((folder / "examples.json").read_text())
    page = (folder / "preview.html").read_text()
    assert len(examples) == 2
    for example in examples:
        assert f"<summary>{example['place']} " in page
        trained = [part["text"] for part in example["stretches"] if part["is_trained"]]
        assert trained[0].startswith("It is <b>")


PREFERENCE = [
    {"prompt": f"Say {number}.", "chosen": f"Good {number}.", "rejected": f"Bad {number}."} for number in range(3)
]


def test_preview_shows_the_rejected_answer_after_the_chosen_one(run: Callable[..., PreparedData]) -> None:
    page = (run(PREFERENCE, objective="preference").folder / "preview.html").read_text()
    assert page.index("<mark>Good 1.</mark>") < page.index("<mark>Bad 1.</mark>") < page.index("<mark>Good 2.</mark>")


def test_preview_marks_undesirable_answers(run: Callable[..., PreparedData]) -> None:
    rows = [{**pair("a", "Nice one."), "label": True}, {**pair("b", "Ugly one."), "label": False}]
    page = (run(rows, objective="unpaired").folder / "preview.html").read_text()
    shown = {part.split("<mark>")[1][:4]: "undesirable" in part for part in page.split("<details open>")[1:]}
    assert shown == {"Nice": False, "Ugly": True}


def test_preview_shows_documents_from_anywhere_in_packed_rows(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    product = run(ROWS, packing=True)
    assert product.packed_rows < 3
    sample = SplitFile(product.folder / "train").sample(6)
    assert len({document.row for document in sample}) == 6
    assert sample == SplitFile(product.folder / "train").sample(6)
    assert sorted(document.row for document in SplitFile(product.folder / "train").sample(99)) == list(range(12))


def test_preview_counts_each_source_and_shows_rows_of_every_reason(
    run: Callable[..., PreparedData], tmp_path: Path
) -> None:
    first = write_jsonl(tmp_path / "one.jsonl", [*ROWS, ROWS[3], *[pair(f"q{number}", " ") for number in range(9)]])
    second = write_jsonl(
        tmp_path / "two.jsonl", [pair("Who?", "Nobody, as far as we know."), pair("Why?", "word " * 300)]
    )
    page = (run(path=f"{first},{second}", bad_rows="drop").folder / "preview.html").read_text()
    assert '<tr><td>one.jsonl</td><td class="n">22</td><td class="n">12</td>' in page
    assert '<tr><td>two.jsonl</td><td class="n">2</td><td class="n">1</td>' in page
    assert "<td>one.jsonl:13</td><td>duplicate</td><td>of one.jsonl:4</td>" in page
    assert "<td>two.jsonl:2</td><td>longer than max_tokens</td>" in page
    assert page.count("<td>the answer is empty</td>") == 4  # one count and the first three


def test_why_shows_the_rejected_answer(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    text = explain_row(run(PREFERENCE, objective="preference").folder, "rows.jsonl:2", tokenizer)
    assert "⟪Good 1.<|im_end|>⟫" in text
    assert "⟪Bad 1.<|im_end|>⟫" in text.split("rejected answer")[1]


def test_why_counts_the_tokens_of_a_long_row_once(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    text = explain_row(run([*ROWS, pair("q", "a b c " * 60)], max_tokens=64).folder, "rows.jsonl:13", tokenizer)
    assert "dropped, because: longer than max_tokens (" in text
    assert text.count("tokens") == 2


def test_summary_names_the_mix(run: Callable[..., PreparedData], tmp_path: Path, capsys: Any) -> None:
    one, two = write_jsonl(tmp_path / "one.jsonl", ROWS), write_jsonl(tmp_path / "two.jsonl", [pair("Who?", "Me.")])
    run(sources={"facts": SourceConfig(path=str(one), rows=5), "talk": SourceConfig(path=str(two))})
    assert "mix, before rows are held out: facts 5 rows, talk 1 row\n" in capsys.readouterr().out


def test_why_shows_a_kept_row_with_its_trained_text(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    product = run(ROWS, packing=True)
    text = explain_row(product.folder, "rows.jsonl:4", tokenizer)
    assert "rows.jsonl:4 (row 3): kept and trained on" in text
    assert "What is 3?<|im_end|>\n<|im_start|>assistant\n⟪It is <b>3</b>.<|im_end|>⟫" in text


def test_why_is_printed(run: Callable[..., PreparedData], tokenizer: Any, capsys: Any) -> None:
    explain(run(ROWS).folder, "rows.jsonl:1", tokenizer)
    assert "rows.jsonl:1 (row 0): kept and trained on" in capsys.readouterr().out


def test_why_explains_a_dropped_row(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    product = run([*ROWS, pair("q", " ")], bad_rows="drop")
    assert explain_row(product.folder, "rows.jsonl:13", tokenizer).endswith("dropped, because: the answer is empty")


def test_why_names_the_original_of_a_duplicate(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    product = run([*ROWS, ROWS[5]])
    assert explain_row(product.folder, "12", tokenizer).endswith("dropped as a duplicate of rows.jsonl:6 (row 5)")


def test_unknown_row_is_an_error_with_the_ledgers_rows(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"no such row; it has rows\.jsonl:1 to 12"):
        explain_row(run(ROWS).folder, "rows.jsonl:99", tokenizer)


def test_summary_names_what_was_lost(run: Callable[..., PreparedData], capsys: Any) -> None:
    run([*ROWS, ROWS[0], pair("q", "")], bad_rows="drop")
    assert (
        "14 rows read, 12 kept (12 to train on, 0 held out); dropped: the answer is empty (1); duplicate (1)"
        in " ".join(capsys.readouterr().out.split())
    )


def test_second_start_reads_the_cache_in_under_a_second(
    run: Callable[..., PreparedData], tmp_path: Path, capsys: Any
) -> None:
    first = run(ROWS, cache=str(tmp_path / "cache"), heldout_rows=2)
    capsys.readouterr()
    started = time.monotonic()
    second = run(ROWS, cache=str(tmp_path / "cache"), heldout_rows=2)
    assert time.monotonic() - started < 1
    assert "taken from the cache" in capsys.readouterr().out
    assert dataclasses.replace(second, folder=first.folder) == first
    assert split(second, "train") == split(first, "train")


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 5},
    "length": {"max_tokens": 100},
    "rows": {"rows": ROWS[1:]},
    "system": {"system": "x"},
}


@pytest.mark.parametrize("what", CHANGES)
def test_cache_is_left_alone_when_something_that_matters_changes(
    what: str, run: Callable[..., PreparedData], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"rows": ROWS, "cache": str(tmp_path / "cache")}
    assert run(**settings).fingerprint != run(**{**settings, **CHANGES[what]}).fingerprint


def test_cache_is_left_alone_when_the_template_changes(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{# another #}" + tokenizer.chat_template
    assert run(ROWS).fingerprint != run(ROWS, with_tokenizer=other).fingerprint


def test_cache_that_was_tampered_with_is_made_again(
    run: Callable[..., PreparedData], tmp_path: Path, capsys: Any
) -> None:
    first = run(ROWS, cache=str(tmp_path / "cache"))
    kept = tmp_path / "cache" / first.fingerprint / "train" / "data-00000-of-00001.arrow"
    kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    assert run(ROWS, cache=str(tmp_path / "cache")) == dataclasses.replace(first, folder=tmp_path / "out1")
    assert "was changed since it was written" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("content", ["", '{"files": {', "[1]", "{}"], ids=["empty", "cut off", "a list", "no files"])
def test_cache_whose_record_is_damaged_is_made_again(
    content: str, run: Callable[..., PreparedData], tmp_path: Path, capsys: Any
) -> None:
    first = run(ROWS, cache=str(tmp_path / "cache"))
    record = tmp_path / "cache" / first.fingerprint / "product.json"
    record.write_text(content)
    assert run(ROWS, cache=str(tmp_path / "cache")) == dataclasses.replace(first, folder=tmp_path / "out1")
    assert "so all data are prepared again" in " ".join(capsys.readouterr().out.split())
    assert json.loads(record.read_text())["product"]["train_rows"] == first.train_rows


def test_cache_that_is_full_ends_no_run(
    run: Callable[..., PreparedData], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("finetune.data.cache.shutil.copyfile", full)
    assert run(ROWS, cache=str(tmp_path / "cache")).train_rows
    assert "cannot be written: No space left on device" in " ".join(capsys.readouterr().out.split())
    assert not list((tmp_path / "cache").glob(".new-*"))


def test_cache_that_cannot_be_made_ends_no_run(
    run: Callable[..., PreparedData], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    assert run(ROWS, cache=None).train_rows
    assert "cannot be made: Not a directory" in " ".join(capsys.readouterr().out.split())


def test_what_killed_processes_left_in_the_cache_is_deleted(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, age in (("old", 2 * 24 * 3600), ("young", 60)):
        (cache / f".new-{name}").mkdir(parents=True)
        os.utime(cache / f".new-{name}", (time.time() - age,) * 2)
    run(ROWS, cache=str(cache))
    assert [left.name for left in cache.glob(".new-*")] == [".new-young"]
