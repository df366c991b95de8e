"""Sound models pass, everything is left as it was, failures have their consequences, and the cost is logged."""

import dataclasses
import json

import pytest
import torch
from datasets import load_from_disk

from finetune.config import load as load_config
from finetune.errors import TrainError
from finetune.jsonable import to_jsonable
from finetune.preflight import PreflightConfig
from finetune.preflight.batch import documents, largest_rows, shortened, uneven
from finetune.preflight.checks import CHECKS
from finetune.preflight.stage import run_checks
from finetune.products import PreflightResult
from tests.fixtures.pairs import COMPOSED, pairs_of
from tests.fixtures.preflight import Scene
from tests.preflight.bugs import contaminate, disk_full, double_a_gradient, start_away_from_zero, write_plan


def names(result: PreflightResult, *, passed: bool) -> list[str]:
    return [check.name for check in result.checks if check.passed is passed]


def test_every_quick_check_passes_on_a_sound_model(scene: Scene) -> None:
    write_plan(scene)
    result = scene.run_preflight()
    assert names(result, passed=True) == [check.name for check in CHECKS if not check.only_full]
    assert [check.name for check in result.skipped] == ["learning", "ending", "reload"]
    assert result.packing_is_isolated
    assert result.fused_layers_are_exact


@pytest.mark.slow
def test_every_check_passes_on_a_sound_model_and_nothing_is_left_behind(scene: Scene) -> None:
    write_plan(scene)
    before = {name: p.detach().clone() for name, p in scene.model.named_parameters()}
    result = scene.run_preflight("full")
    assert names(result, passed=True) == [check.name for check in CHECKS]
    assert not result.skipped
    assert all(torch.equal(before[name], p) for name, p in scene.model.named_parameters())
    assert [file.name for file in result.folder.iterdir()] == ["trained_text.txt"]


def test_a_preflight_leaves_the_adapter_and_the_random_state_as_they_were(scene: Scene) -> None:
    before = {name: p.detach().clone() for name, p in scene.model.named_parameters() if p.requires_grad}
    attributes, state = set(vars(scene.model)), torch.random.get_rng_state()
    scene.run_preflight()
    after = {name: p for name, p in scene.model.named_parameters() if p.requires_grad}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(vars(scene.model)) == attributes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_failed_check_stops_the_run_with_the_likely_cause(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    start_away_from_zero(scene, monkeypatch)
    with pytest.raises(
        TrainError, match=r"1 of 8 checks failed.*largest logit difference.*Likely cause: B does not start at zero"
    ):
        scene.run_preflight()


def test_a_check_that_runs_out_of_disk_names_the_disk(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_full(scene, monkeypatch)
    with pytest.raises(TrainError, match=r"File too large.*Likely cause: the disk is full"):
        scene.run_preflight()


def test_attention_that_mixes_documents_makes_training_unpack_them(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    contaminate(scene, monkeypatch)
    result = scene.run_preflight()
    assert not result.packing_is_isolated
    assert names(result, passed=False) == ["packing"]


def test_fused_layers_with_a_wrong_factor_are_turned_off_for_the_other_checks_too(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    double_a_gradient(scene, monkeypatch)
    result = scene.run_preflight()
    assert not result.fused_layers_are_exact
    assert not scene.trainable.fusion.enabled
    assert names(result, passed=False) == ["fused_layers"]


def test_the_cost_and_what_did_not_run_are_logged(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    result = scene.run_preflight()
    output = " ".join(capsys.readouterr().out.split())
    assert f"quick: {len(result.checks)} of {len(result.checks)} checks passed in" in output
    assert "of the training's estimated" in output
    assert "not run (only preflight=full): the loss falls when one batch is repeated" in output
    assert result.training_seconds
    assert result.training_seconds > 0


def test_without_a_trainer_the_checks_that_need_one_are_skipped(scene: Scene) -> None:
    scene.make_trainer = None
    result = scene.run_preflight()
    assert [check.name for check in result.skipped] == [
        "trained_text",
        "accumulation",
        "learning",
        "ending",
        "reload",
    ]


def with_pairs(scene: Scene) -> Scene:
    """Replaces the rows of the scene by preference pairs."""
    config = load_config([*COMPOSED, "optim.learning_rate=2e-3", "train.micro_batch=2"])
    folder = scene.run / "pairs"
    folder.mkdir()
    data = pairs_of(folder, scene.trainable.tokenizer)
    scene.job = dataclasses.replace(scene.job, data=data, config=config.train, optim=config.optim)
    return scene


def test_pairs_are_checked_with_the_trainer_and_the_collator_of_pairs(scene: Scene) -> None:
    checks = {check.name: check for check in with_pairs(scene).run_preflight().checks}
    assert checks["trained_text"].figure.startswith("28 tokens of 4 documents")
    assert checks["accumulation"].figure.startswith("2 rows: loss 0.69")
    assert all(check.passed for check in checks.values())


def test_a_preference_is_learned_from_the_repeated_batch_and_has_no_end_to_check(scene: Scene) -> None:
    context = with_pairs(scene).context("full")
    records, skipped = run_checks(context, [check for check in CHECKS if check.name in ("learning", "ending")])
    assert [(record.name, record.passed) for record in records] == [("learning", True)]
    assert [check.name for check in skipped] == ["ending"]


def test_off_checks_nothing_and_logs_so(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert scene.run_preflight("off").checks == []
    assert "skipped (preflight=off); the report will say so" in capsys.readouterr().out


def test_what_comes_after_training_decides_nothing_and_is_described(scene: Scene) -> None:
    disk = {"merged": 10**18, "checkpoints": 5, "adapter": 1}
    write_plan(scene, later={"merge": "streamed", "eval": "offloaded"}, disk=disk)
    check = next(check for check in scene.run_preflight().checks if check.name == "memory_and_disk")
    assert check.passed
    assert "later merge streamed, eval offloaded, disk 909494.7 TiB" in check.figure


def test_a_run_that_ends_with_training_has_no_later_stage(scene: Scene) -> None:
    write_plan(scene, disk={"merged": 10**18, "checkpoints": 5, "adapter": 1})
    scene.until = "train"
    check = next(check for check in scene.run_preflight().checks if check.name == "memory_and_disk")
    assert check.passed
    assert "disk 6 B (checkpoints 5 B, adapter 1 B)" in check.figure
    assert "later" not in check.figure


def test_trained_text_is_written_for_people_to_read(scene: Scene) -> None:
    result = scene.run_preflight()
    assert '{"time":' in (result.folder / "trained_text.txt").read_text(encoding="utf-8")


def test_the_manifest_can_hold_a_preflight(scene: Scene) -> None:
    checks = json.loads(json.dumps(to_jsonable(scene.run_preflight().checks)))
    assert all(set(check) == {"name", "passed", "figure", "bound", "sentence", "cause", "seconds"} for check in checks)


def test_largest_batch_is_made_of_the_longest_rows(scene: Scene) -> None:
    rows = load_from_disk(str(scene.job.data.folder / "train"))
    sizes = sorted(len(row["input_ids"]) for row in rows)
    assert [len(row["input_ids"]) for row in largest_rows(rows, count=2)] == sizes[:-3:-1]
    assert sum(len(document["input_ids"]) for document in scene.context("full").rows.documents) == sizes[-1]


def test_documents_of_a_pack_are_its_tokens_cut_at_the_borders() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, -100, 5], "seq_lengths": [2, 3]}
    assert documents([row]) == [
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {"input_ids": [3, 4, 5], "labels": [-100, -100, 5]},
    ]


def test_shortening_keeps_the_end_of_the_answer() -> None:
    document = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, -100]}
    assert shortened(document, tokens=2) == {"input_ids": [3, 4], "labels": [3, 4]}


def test_every_second_row_trains_on_a_quarter_of_its_answer() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, 4, 5]}
    assert [document["labels"] for document in uneven([row, row])] == [[-100, 2, 3, 4, 5], [-100, -100, -100, -100, 5]]


def test_settings_that_make_no_sense_are_problems() -> None:
    assert list(PreflightConfig(level="some", rows=1, steps=0).problems()) == [
        "preflight.level must be one of quick, full, off; got 'some'",
        "preflight.rows must be at least 2, or there is nothing to pack or to accumulate; got 1",
        "preflight.steps must be at least 1; got 0",
    ]
