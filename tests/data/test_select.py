"""Splits by content and seed; duplicates and leaks; the ledger's books balance."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from finetune.errors import DataError
from finetune.products import PreparedData
from tests.data.helpers import ledger, pair, split, write_jsonl

ROWS = [pair(f"What is {number}?", f"It is {number}.") for number in range(40)]


def held_out(product: PreparedData) -> set[int]:
    return {row["row"] for row in ledger(product) if row["split"] == "heldout"}


def test_exactly_heldout_rows_are_held_out(run: Callable[..., PreparedData]) -> None:
    product = run(ROWS, heldout_rows=7)
    assert (product.train_rows, product.heldout_rows) == (33, 7)


def test_a_share_of_the_rows_is_held_out(run: Callable[..., PreparedData]) -> None:
    assert run(ROWS, heldout_share=0.25).heldout_rows == 10


def test_the_seed_decides_the_split(run: Callable[..., PreparedData]) -> None:
    first, again, other = (held_out(run(ROWS, heldout_rows=7, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_order_of_the_rows_does_not_change_the_split(run: Callable[..., PreparedData]) -> None:
    forwards = held_out(run(ROWS, heldout_rows=7))
    backwards = held_out(run(ROWS[::-1], heldout_rows=7))
    assert {39 - row for row in backwards} == forwards


def test_equal_prompts_fall_on_one_side(run: Callable[..., PreparedData]) -> None:
    rows = [pair(f"What is {number // 2}?", f"Answer {number}") for number in range(40)]
    out = held_out(run(rows, heldout_rows=8))
    assert {row ^ 1 for row in out} == out


def test_holding_out_everything_is_refused(run: Callable[..., PreparedData]) -> None:
    with pytest.raises(DataError, match="would leave nothing to train on"):
        run(ROWS, heldout_rows=40)


def test_duplicates_name_their_original(run: Callable[..., PreparedData]) -> None:
    product = run([*ROWS[:3], ROWS[1]])
    assert product.rows["duplicate"] == 1
    assert [row["duplicate_of"] for row in ledger(product)] == [-1, -1, -1, 1]


def test_duplicates_are_kept_with_duplicates_keep(run: Callable[..., PreparedData]) -> None:
    product = run([*ROWS[:3], ROWS[1]], duplicates="keep")
    assert product.rows["kept"] == 4
    assert product.rows["duplicate"] == 0


def test_training_rows_that_are_held_out_are_dropped(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    product = run(ROWS[:5], heldout_path=str(write_jsonl(tmp_path / "held.jsonl", ROWS[3:7])))
    assert product.rows["dropped"] == {"is also a held-out row": 2}
    assert product.heldout_rows == 4


def test_the_first_held_out_rows_are_a_fair_sample_of_a_sorted_file(
    run: Callable[..., PreparedData], tmp_path: Path
) -> None:
    listed = [pair(f"question {number}", f"label {number // 20}") for number in range(80)]
    file = str(write_jsonl(tmp_path / "sorted.jsonl", listed))
    first = [
        [row["reference"] for row in split(run(ROWS, heldout_path=file, seed=seed), "heldout")[:20]] for seed in (1, 2)
    ]
    assert len(set(first[0])) == 4
    assert first[0] == first[1]


def test_held_out_rows_carry_prompt_reference_and_ledger_row(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    product = run(ROWS, heldout_rows=3, packing=True)
    for row in split(product, "heldout"):
        source = ROWS[row["row"]]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": source["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        assert row["prompt_ids"] == tokenizer(prompt, add_special_tokens=False).input_ids
        assert row["reference"] == source["completion"]
        assert json.loads(row["chat"]) == {"messages": [{"role": "user", "content": source["prompt"]}]}
        assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]


def test_the_number_of_processes_changes_nothing(run: Callable[..., PreparedData]) -> None:
    rows = [pair(f"What is {number}?", f"It is {number % 700}.") for number in range(1500)]
    single, parallel = (
        run(rows, workers=1, packing=True, heldout_rows=9),
        run(rows, workers=2, packing=True, heldout_rows=9),
    )
    assert split(single, "train") == split(parallel, "train")
    assert ledger(single) == ledger(parallel)


ANY_ROW = st.one_of(
    st.builds(
        pair, st.sampled_from(["q", "longer question " * 8, ""]), st.sampled_from(["a", "b", "", "long answer " * 12])
    ),
    st.just({"prompt": "only"}),
    st.just("no object"),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(ANY_ROW, min_size=1, max_size=25),
    too_long=st.sampled_from(["drop", "truncate", "truncate_prompt"]),
    packing=st.booleans(),
    share=st.sampled_from([0.0, 0.3]),
)
def test_the_ledger_balances_whatever_the_rows(
    run: Callable[..., PreparedData], rows: list[Any], too_long: str, packing: bool, share: float
) -> None:
    rows = [pair("always", "good"), *rows]
    product = run(
        rows,
        format="prompt_completion",
        bad_rows="drop",
        too_long=too_long,
        packing=packing,
        heldout_share=share,
        max_tokens=60,
        pack_tokens=120,
    )
    lines, counts = ledger(product), product.rows
    assert counts["in"] == len(rows) == len(lines)
    assert counts["in"] == counts["kept"] + sum(counts["dropped"].values()) + counts["duplicate"]
    assert counts["kept"] == product.train_rows + product.heldout_rows == sum(line["fate"] == "kept" for line in lines)
    assert counts["truncated"] == sum(line["truncated_by"] > 0 for line in lines)
    train, out = split(product, "train"), split(product, "heldout")
    train_lines = [line for line in lines if line["split"] == "train"]
    assert product.tokens == sum(line["tokens"] for line in train_lines) == sum(len(row["input_ids"]) for row in train)
    assert (
        product.trained_tokens
        == sum(line["trained_tokens"] for line in train_lines)
        == sum(np.sum(np.array(row["labels"]) != -100) for row in train)
    )
    assert sorted(number for row in train for number in row["rows"]) == [line["row"] for line in train_lines]
    assert sorted(row["row"] for row in out) == [line["row"] for line in lines if line["split"] == "heldout"]
    for line in train_lines:
        row = train[line["pack"]]
        at = row["rows"].index(line["row"])
        assert sum(row["seq_lengths"][:at]) == line["position"]
        assert row["seq_lengths"][at] == line["tokens"]


def test_work_can_be_sent_to_another_process(tokenizer: Any) -> None:
    import pickle

    from finetune.data import template
    from finetune.data.encoder import serialize
    from finetune.data.render import Renderer
    from finetune.data.worker import Worker, WorkerSettings

    chat = template.inspect_template(tokenizer)
    renderer = Renderer(
        template=chat,
        train_roles=frozenset(["assistant"]),
        system=None,
        control_tokens="text",
        tools="template",
        bos="",
        eos="",
    )
    settings = WorkerSettings(
        formats={0: ("prompt_completion", {})},
        references=frozenset(),
        renderer=renderer,
        tokenizer=serialize(tokenizer),
        max_tokens=99,
        too_long="drop",
        compares=False,
    )
    done = Worker(pickle.loads(pickle.dumps(settings))).process(0, [(1, ROWS[0])])
    assert done.ids.tolist() == Worker(settings).process(0, [(1, ROWS[0])]).ids.tolist()


def test_tests_of_held_out_rows_are_kept_with_the_reference(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    rows = [
        {**pair(f"Add {number}.", f"def f(x): return x + {number}"), "tests": f"assert f(1) == {number + 1}"}
        for number in range(8)
    ]
    listed = [
        {**pair("Double.", "def f(x): return 2 * x"), "tests": ["assert f(1) == 2", "assert f(2) == 4"]},
        pair("Say hi.", "Hi."),
    ]
    product = run(rows, heldout_path=str(write_jsonl(tmp_path / "heldout.jsonl", listed)))
    assert [row["tests"] for row in split(product, "heldout")] == ["assert f(1) == 2\nassert f(2) == 4", None]
    assert "tests" not in split(product, "train")[0]


def test_rows_without_tests_have_no_such_column(run: Callable[..., PreparedData]) -> None:
    assert "tests" not in split(run(ROWS, heldout_rows=7), "heldout")[0]


@pytest.mark.parametrize(
    ("tests", "message"), [(5, "column 'tests' is not a list"), ({"inputs": [1]}, "line of column 'tests' is not text")]
)
def test_tests_that_are_no_source_are_named(
    tests: Any, message: str, run: Callable[..., PreparedData], tmp_path: Path
) -> None:
    wrong = [{**pair(), "tests": tests}]
    with pytest.raises(DataError, match=message):
        run(ROWS, heldout_path=str(write_jsonl(tmp_path / "heldout.jsonl", wrong)))
