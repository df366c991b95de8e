"""Step 0 in two forms: the comparison on planted differences, and the command on a tiny base."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.bench.conformance import Form, compare
from finetune.cli import main
from tests.fixtures.overrides import overrides

NAMES = ("model.layers.0.q_proj.lora_B", "model.layers.1.q_proj.lora_B")


def form(**changes: Any) -> Form:
    torch.manual_seed(1)
    parts = {f"{part}.{name}": torch.randn(8, 16) for part in ("gradient", "step") for name in NAMES}
    tensors = {**parts, "merged.model.layers.0.q_proj": torch.randn(8, 8), "logits": torch.randn(4, 32)}
    codes = {"model.layers.0.q_proj": "aa", "model.layers.1.q_proj": "bb"}
    same = Form(loss=2.0, codes=codes, dtype="float32", form=["cpu"], tensors=tensors)
    return dataclasses.replace(same, **changes)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    tensors = dict(form().tensors)
    return {"tensors": tensors | {name: change(tensors[name])}}


def test_two_equal_forms_pass_everywhere() -> None:
    rows = compare(form(), form())
    assert [row.what for row in rows if row.passed] == [row.what for row in rows]
    assert len(rows) == 6


@pytest.mark.parametrize(
    ("changes", "fails", "worst"),
    [
        ({"codes": {"model.layers.0.q_proj": "aa", "model.layers.1.q_proj": "cc"}}, "codes", "model.layers.1.q_proj"),
        ({"codes": {"model.layers.0.q_proj": "aa"}}, "codes", "model.layers.1.q_proj"),
        ({"loss": 2.001}, "loss", ""),
        ({"loss": float("nan")}, "loss", ""),
        (changed(f"gradient.{NAMES[1]}", lambda t: 1.1 * t), "gradients", "layer 1: 0.1"),
        (changed(f"gradient.{NAMES[1]}", lambda t: t * float("nan")), "gradients", "layer"),
        (changed(f"step.{NAMES[0]}", lambda t: -t), "one optimizer step", ""),
        (changed(f"step.{NAMES[0]}", lambda t: 0 * t), "one optimizer step", ""),
        (changed("logits", lambda t: t.flip(-1)), "predictions", ""),
        (changed("merged.model.layers.0.q_proj", lambda t: t + 0.01), "merged weights", "model.layers.0.q_proj"),
    ],
)
def test_a_planted_difference_fails_in_its_row_alone(changes: dict[str, Any], fails: str, worst: str) -> None:
    (failed,) = [row for row in compare(form(**changes), form()) if not row.passed]
    assert failed.what.startswith(fails)
    assert failed.worst.startswith(worst)


def test_the_coarser_dtype_decides_the_bounds() -> None:
    rounded = form(dtype="bfloat16", **changed(f"gradient.{NAMES[1]}", lambda t: 1.05 * t))
    assert all(row.passed for row in compare(rounded, form()))
    assert all(row.passed for row in compare(form(), rounded))


def result(printed: str) -> dict[str, Any]:
    text = " ".join(line.removeprefix("bench").strip() for line in printed.splitlines())
    found: dict[str, Any] = json.loads(text[text.index('{"passed"') :])
    return found


def test_the_run_of_a_tiny_base_conforms_to_plain_float32(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["bench", "conformance", *overrides(tmp_path, tiny_base)])
    found = result(capsys.readouterr().out)
    assert [row for row in found["comparisons"] if not row["passed"]] == []
    assert (code, found["passed"]) == (0, True)
    assert not (tmp_path / "outputs").exists()


def test_another_base_is_no_reference(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = "hardware.device=cpu model.dtype=float32 kernels=plain quantization=fp4"
    code = main(["bench", "conformance", *overrides(tmp_path, tiny_base), "--reference", reference])
    failed = [row["what"] for row in result(capsys.readouterr().out)["comparisons"] if not row["passed"]]
    assert code == 1
    assert {"codes of the quantized base", "gradients of the adapter", "merged weights"} <= set(failed)


def test_settings_that_do_not_fit_are_refused_before_anything_is_computed(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["bench", "conformance", *overrides(tmp_path, tiny_base), "--reference", "model.dtype=half"])
    assert code == 2
    assert "model.dtype" in capsys.readouterr().err
