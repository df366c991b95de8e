"""Settings without an effect, and settings that nothing reads: what counts as reading, and what tracking costs."""

import copy
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import pytest

from finetune.config import RunConfig, load, to_dict, to_yaml
from finetune.config.fields import all_keys, unknown_key
from finetune.jsonable import to_jsonable
from finetune.lora import LoraConfig
from finetune.provenance.unused import UnusedSetting, unused_overrides, unused_settings, warn_unused_overrides
from finetune.run import fingerprint
from tests.provenance.read_tracking import KNOWN_AFTER_RUN, READ_ELSEWHERE, track_reads, unread_settings


@dataclass(kw_only=True, slots=True)
class PlantedLora(LoraConfig):
    """With a key that no code knows."""

    nobody: int = 3


@pytest.fixture
def config() -> RunConfig:
    loaded = load(["+experiment=quickstart"])
    track_reads(loaded)
    return loaded


def test_a_key_is_read_by_reading_it_and_by_nothing_else(config: RunConfig) -> None:
    assert {"lora.rank", "lora.alpha", "export.adapter.max_kl"} <= set(unread_settings(config))
    assert config.lora.rank == 16
    assert "lora.rank" not in unread_settings(config)
    assert "lora.alpha" in unread_settings(config)


def test_writing_it_down_is_no_reading(config: RunConfig) -> None:
    before = unread_settings(config)
    to_yaml(config)
    to_dict(config)
    to_jsonable(config)
    fingerprint({"lora": config.lora, "optim": config.optim})
    repr(config)
    assert unread_settings(config) == before
    assert "lora.rank" in before


def test_two_options_of_one_dataclass_are_told_apart(config: RunConfig) -> None:
    assert config.export["adapter"].max_kl > 0
    assert "export.adapter.max_kl" not in unread_settings(config)
    assert "export.safetensors.max_kl" in unread_settings(config)


def test_a_rule_of_a_method_counts_as_reading_what_it_reads(config: RunConfig) -> None:
    assert config.lora.width == 16
    assert not {"lora.rank", "lora.variant"} & set(unread_settings(config))


def test_after_the_first_reading_the_field_is_the_plain_slot_again(config: RunConfig) -> None:
    assert "rank" in vars(type(config.lora))
    assert config.lora.rank
    assert "rank" not in vars(type(config.lora))
    assert type(config.lora).rank is LoraConfig.rank  # type: ignore[misc]


def test_a_tracked_configuration_can_be_changed_copied_and_sent_to_another_process(config: RunConfig) -> None:
    config.run.name = "other"
    assert config.run.name == "other"
    for same in (copy.deepcopy(config.lora), pickle.loads(pickle.dumps(config.lora))):
        assert type(same) is LoraConfig
        assert same.rank == 16


def test_a_second_run_of_one_configuration_starts_to_count_anew(config: RunConfig) -> None:
    assert config.lora.rank
    track_reads(config)
    assert "lora.rank" in unread_settings(config)
    assert type(config.lora).__mro__[1] is LoraConfig


def test_a_planted_dead_key_is_named() -> None:
    loaded = load(["+experiment=quickstart"])
    loaded.lora = PlantedLora(**to_jsonable(loaded.lora))
    track_reads(loaded)
    read_all_but(loaded, "nobody")
    assert unread_settings(loaded) == ["lora.nobody"]


def read_all_but(part: Any, left_out: str) -> None:
    for name in part.__dataclass_fields__:
        if name != left_out:
            value = getattr(part, name)
            for inner in value.values() if isinstance(value, dict) else [value]:
                if hasattr(inner, "__dataclass_fields__"):
                    read_all_but(inner, left_out)


def test_a_key_of_what_was_not_chosen_is_no_dead_key() -> None:
    chosen, other = load(["+experiment=quickstart", "quantization=int8"]), load(["+experiment=quickstart"])
    for config in (chosen, other):
        track_reads(config)
    assert "quantization.threshold" in unread_settings(chosen)
    assert "quantization.threshold" not in unread_settings(other)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["train.epochs=3"], ["train.epochs=3 has no effect: train.steps=72 is set"]),
        (["train.epochs=3", "train.steps=null"], []),
        (["quantization=int8", "quantization.bits=3"], 
         ["quantization.bits=3 has no effect: it is hqq's, and quantization.method=int8"]),
        (["quantization=int8", "quantization.double=false"],
         ["quantization.double=false has no effect: it is for nf4, fp4 and qat, and quantization.method=int8"]),
        (["optim.warmup=null", "optim.warmup_steps=2"], 
         ["optim.warmup=null has no effect: optim.warmup_steps=2 is set"]),
        (["export.card.dtype="], 
         ["export.card.dtype= has no effect: left to the format, which may have a single dtype"]),
        (["data.columns={prompt: request}", "launch.heartbeat_timeout_seconds=9", "run.if_exists=resume"], []),
    ],
)  # fmt: skip
def test_what_was_typed_in_vain_is_said_before_the_run_with_its_reason(typed: list[str], said: list[str]) -> None:
    overrides = ["+experiment=quickstart", *typed]
    assert unused_overrides(load(overrides), overrides) == said


def test_a_rule_of_what_only_the_run_shows_excuses_no_typed_setting() -> None:
    overrides = ["+experiment=quickstart", "data.checks.largest_label_share=0.5"]
    loaded = load(overrides)
    track_reads(loaded)
    key = "data.checks.largest_label_share"
    assert (key in unread_settings(loaded, overrides), key in unread_settings(loaded)) == (True, False)


def test_what_was_typed_in_vain_is_an_error_here_and_a_warning_in_runs() -> None:
    overrides = ["+experiment=quickstart", "train.epochs=3"]
    with pytest.raises(UnusedSetting, match=r"train\.epochs=3 has no effect: train\.steps=72 is set"):
        warn_unused_overrides(load(overrides), overrides)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        warn_unused_overrides(load(overrides), overrides)
    assert [warning.category for warning in warned] == [UnusedSetting]


@pytest.mark.parametrize("experiment", ["quickstart", "llama7b_qlora", "dpo_quick"])
def test_every_rule_is_about_settings_that_exist_and_gives_a_reason(experiment: str) -> None:
    loaded = load([f"+experiment={experiment}", "export=[adapter,card,hub,gguf_q8_0]", "tracking=[tensorboard]"])
    for key, reason in unused_settings(loaded):
        assert reason
        assert unknown_key(key, RunConfig) is None, key
    assert set(READ_ELSEWHERE + KNOWN_AFTER_RUN) <= set(all_keys(RunConfig))


def test_clearing_a_recipes_held_out_rows_for_a_file_is_not_unused() -> None:
    own = ["data.hub=null", "data.path=x.jsonl", "data.heldout_path=y.jsonl", "data.heldout_rows=null"]
    overrides = ["+experiment=guanaco_7b", *own]
    assert unused_overrides(load(overrides), overrides) == []
