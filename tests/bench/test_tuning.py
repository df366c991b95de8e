"""The cost of tuning on a quantized base: figures from what each seed gave, and the verb itself on a tiny base."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.bench.quantization import unsupported_status
from finetune.bench.task import split_rows
from finetune.bench.tuning import summarize
from finetune.cli import main
from finetune.cli.dispatch import dispatch
from finetune.errors import ConfigError
from finetune.hardware.backends import BACKENDS


def run(losses: list[list[float]], scores: list[float]) -> dict[str, Any]:
    rounded = {"rounded_losses": [[total + count, count] for total, count in losses], "rounded_scores": [0.0, 0.0]}
    machine = {"seconds": 10.0, "peak_rss_bytes": 5, "tokens_per_second": 1.0, "base_bytes": 7}
    return {"losses": losses, "scores": scores, "untuned": [[8.0, 2], [12.0, 2]], **rounded, **machine}


def test_a_difference_is_paired_by_row_and_pooled_over_seeds() -> None:
    none = [run([[2.0, 2], [6.0, 2]], [1.0, 0.0]), run([[2.2, 2], [6.2, 2]], [1.0, 0.0])]
    other = [run([[2.4, 2], [6.4, 2]], [0.0, 0.0]), run([[2.4, 2], [6.4, 2]], [1.0, 0.0])]
    found = summarize("nf4", other, none)
    assert (found.untuned_loss, found.loss, found.losses) == (5.0, 2.2, [2.2, 2.2])
    assert found.loss_change == {"difference": 0.15, "low": 0.15, "high": 0.15}, (
        "every row is off by the same, so nothing is uncertain"
    )
    assert found.loss_change_by_seed == [0.2, 0.1]
    assert (found.rounded_loss, found.rounded_losses) == (3.2, [3.2, 3.2])
    assert found.rounded_change["difference"] == 1.15
    assert (found.rounded_metric["value"], found.rounded_metric_change["difference"]) == (0.0, -0.5)
    assert found.metric["value"] == 0.25
    assert found.metric_change["difference"] == -0.25
    same = summarize("none", none, none)
    assert (same.loss_change["difference"], same.metric_change["difference"]) == (0.0, 0.0)


def test_rows_are_dealt_from_the_top(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"prompt": str(row), "completion": "x"}) + "\n" for row in range(5)))
    split_rows(source, tmp_path / "dealt", train=3, heldout=2, where="source")
    found = {
        file.stem: [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
        for file in (tmp_path / "dealt").iterdir()
    }
    assert found == {"train": ["0", "1", "2"], "heldout": ["3", "4"]}
    with pytest.raises(ConfigError, match="has 5 rows and 6 are needed; lower rows or heldout"):
        split_rows(source, tmp_path / "dealt", train=3, heldout=3, where="source")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tuning", "--backends", "nf5"], "nf5 is not an option of quantization; choose from awq, fp4"),
        (["tuning", "--metric", "beauty"], "metric must be one of .*; got beauty"),
        (["tuning", "--grid", "moon"], "bench tuning --grid must be moved or as_it_is; got 'moon'"),
        (["quantization", "--methods", "nf5"], "nf5 is not a method; choose from awq, fp4"),
        (["quantization", "--task", "rows.jsonl"], "--task needs --metric"),
        (["quantization", "--task", "none.jsonl", "--metric", "label"], "task=none.jsonl is not a file"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dispatch(["bench", *arguments])


def test_a_method_that_does_not_run_is_a_row_with_its_reason() -> None:
    not_run = {name for name, backend in BACKENDS.items() if not backend.devices}
    assert {name for name in BACKENDS if unsupported_status(name)} == not_run | {"prequantized", "gptq", "awq", "qat"}
    assert unsupported_status("torchao_int4") == f"not run: {BACKENDS['torchao_int4'].reason}"
    assert not unsupported_status("qat", trained=True)


@pytest.mark.slow
def test_the_command_trains_measures_and_ends_with_one_line_of_json(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"say {row}", "completion": f"it is {row % 3}"}) + "\n" for row in range(40))
    )
    command = [
        "bench",
        "tuning",
        f"--source={rows}",
        "--rows=24",
        "--heldout=8",
        f"--model={tiny_base}",
        "--steps=2",
        "--seeds=1",
        "--backends=none,gptq,qat",
        "--metric=label",
        "--max-new-tokens=4",
        f"--out={tmp_path / 'tuning.json'}",
    ]
    assert main(command) == 0
    by_name = {result["backend"]: result for result in json.loads(capsys.readouterr().out.splitlines()[-1])}
    assert [result["status"].partition(":")[0] for result in by_name.values()] == ["measured", "not run", "measured"]
    assert by_name["qat"]["rounded_losses"] == by_name["qat"]["losses"], "rounding its sum gives what was trained"
    assert by_name["none"]["loss_change"]["difference"] == 0
    assert by_name["none"]["loss"] < by_name["none"]["untuned_loss"]
    assert 0 <= by_name["none"]["metric"]["value"] <= 1
