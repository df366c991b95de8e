"""Models whose weights do not fit are measured with weights on disk, and give the same results to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.inference.budget import FreeMemory, InferenceCost, Workload, place_weights
from finetune.inference.dense import cost_of, load_placed, place, stored_elements
from finetune.inference.generation import generate
from finetune.inference.kl_divergence import compare_with_reference, record_reference
from finetune.inference.losses import row_losses
from finetune.inference.rows import read_rows
from finetune.jsonable import to_jsonable
from finetune.model import ModelSpec
from tests.fixtures.artifacts import Line

WORK = Workload(pass_tokens=64, passes=4, rows=4, prompt_tokens=30, new_tokens=6, batch_rows=1)


def dense_spec(line: Callable[..., Line]) -> ModelSpec:
    return line("none", dtype="float32").spec.dense()


def leave_free(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, *, share: float) -> None:
    """Leaves memory for the batches and a share of the weights."""
    plain = place(spec, WORK)
    free = int((plain.working_bytes + share * 4 * stored_elements(spec.base.folder)) / 0.9)
    monkeypatch.setattr("finetune.inference.dense.free_bytes", lambda device: free)


def offloaded(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, *, share: float, scratch: Path) -> Any:
    """Loads a model where only a share of its weights fits in memory next to the batches."""
    leave_free(spec, monkeypatch, share=share)
    placed = place(spec, WORK)
    weights = 4 * stored_elements(spec.base.folder)
    assert placed.disk_bytes == pytest.approx((1 - share) * weights, rel=0.01)
    return load_placed(spec, placed, title="eval", name="base", scratch=scratch)


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_offloaded_models_measure_and_answer_as_those_in_memory(
    line: Callable[..., Line],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    share: float,
) -> None:
    spec = dense_spec(line)
    rows = read_rows(line().data.folder / "heldout")
    prompts = [row["prompt_ids"] for row in rows[:4]]
    plain = spec.load()
    model = offloaded(spec, monkeypatch, share=share, scratch=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert not list(tmp_path.iterdir())  # read from the checkpoint's own files
    assert "are read again for each of" in " ".join(capsys.readouterr().out.split())
    assert row_losses(model, rows, batch_tokens=64) == row_losses(plain, rows, batch_tokens=64)
    reference = record_reference(plain, rows, tmp_path / "reference.f32", batch_tokens=64)
    assert compare_with_reference(model, rows, reference, batch_tokens=64).max_difference == 0
    answers = [generate(each, tokenizer, prompts, max_new_tokens=6, batch_rows=2) for each in (model, plain)]
    assert answers[0] == answers[1]


def test_an_export_is_opened_with_weights_on_disk_where_they_do_not_fit(
    line: Callable[..., Line], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from finetune.export.runtime import loading_in, placement

    spec = dense_spec(line)
    rows = read_rows(line().data.folder / "heldout")
    request = json.loads(json.dumps(to_jsonable({"dense": {"spec": spec, "workload": WORK, "scratch": tmp_path}})))
    assert placement(request) == {}
    assert placement({"dense": None}) == {}
    leave_free(spec, monkeypatch, share=0.3)
    with loading_in("float32", where=placement(request)):  # as an export's snippet says it
        model = AutoModelForCausalLM.from_pretrained(spec.base.folder, dtype=torch.bfloat16, device_map="auto")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert row_losses(model, rows, batch_tokens=64) == row_losses(spec.load(), rows, batch_tokens=64)


def test_the_cost_of_a_model_is_that_of_its_dimensions(tiny_base: Path) -> None:
    from transformers import AutoConfig

    from finetune.config_json import from_config_json

    config = AutoConfig.from_pretrained(tiny_base)
    for dtype in (torch.float32, torch.bfloat16):
        planned = InferenceCost.of(from_config_json(tiny_base), element_bytes=dtype.itemsize)
        assert cost_of(config, dtype=dtype) == planned


def test_weights_are_spread_over_gpus_before_any_is_offloaded(tiny_base: Path) -> None:
    """A machine of two GPUs that is only described: transformers' map needs no device."""
    from accelerate import infer_auto_device_map
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_base)
    cost, size = cost_of(config, dtype=torch.bfloat16), 2 * stored_elements(tiny_base)
    working = place_weights(size, cost=cost, workload=WORK, free=FreeMemory(devices=(2**40,))).working_bytes
    free = FreeMemory(devices=(int((working + 0.8 * size) / 0.9),) * 2, host=2**40)
    placed = place_weights(size, cost=cost, workload=WORK, free=free)
    assert placed.offloaded_bytes == 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    places = infer_auto_device_map(model, max_memory=placed.max_memory, no_split_module_classes=["LlamaDecoderLayer"])
    assert set(places.values()) == {0, 1}
