"""Settings that nobody read: what counts as reading, what does not, and that watching costs nothing afterwards."""

import copy
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import pytest

from finetune.config import RunConfig, load, to_dict, to_yaml
from finetune.data.cache import credit
from finetune.lora import LoraConfig
from finetune.overrides import paths, unknown
from finetune.provenance.unread import BY_DESIGN, UnreadSetting, idle, tell_unread, unread, watch
from finetune.run import fingerprint, to_jsonable


@dataclass(kw_only=True, slots=True)
class PlantedLora(LoraConfig):
    """With a key that no code knows."""

    nobody: int = 3


@pytest.fixture
def config() -> RunConfig:
    loaded = load(["+experiment=quickstart"])
    watch(loaded)
    return loaded


def test_a_key_is_read_by_reading_it_and_by_nothing_else(config: RunConfig) -> None:
    assert {"lora.rank", "lora.alpha", "export.adapter.max_kl"} <= set(unread(config))
    assert config.lora.rank == 16
    assert "lora.rank" not in unread(config)
    assert "lora.alpha" in unread(config)


def test_writing_it_down_is_no_reading(config: RunConfig) -> None:
    before = unread(config)
    to_yaml(config)
    to_dict(config)
    to_jsonable(config)
    fingerprint(config.lora, {"optim": config.optim})
    repr(config)
    assert unread(config) == before
    assert "lora.rank" in before


def test_two_options_of_one_dataclass_are_told_apart(config: RunConfig) -> None:
    assert config.export["adapter"].max_kl > 0
    assert "export.adapter.max_kl" not in unread(config)
    assert "export.safetensors.max_kl" in unread(config)


def test_a_rule_of_a_method_counts_as_reading_what_it_reads(config: RunConfig) -> None:
    assert config.lora.width == 16
    assert not {"lora.rank", "lora.variant"} & set(unread(config))


def test_after_the_first_reading_the_field_is_the_plain_slot_again(config: RunConfig) -> None:
    assert "rank" in vars(type(config.lora))
    assert config.lora.rank
    assert "rank" not in vars(type(config.lora))
    assert type(config.lora).rank is LoraConfig.rank  # type: ignore[misc]


def test_a_watched_configuration_can_be_changed_copied_and_sent_to_another_process(config: RunConfig) -> None:
    config.run.name = "other"
    assert config.run.name == "other"
    for same in (copy.deepcopy(config.lora), pickle.loads(pickle.dumps(config.lora))):
        assert type(same) is LoraConfig
        assert same.rank == 16


def test_a_second_run_of_one_configuration_starts_to_count_anew(config: RunConfig) -> None:
    assert config.lora.rank
    watch(config)
    assert "lora.rank" in unread(config)
    assert type(config.lora).__mro__[1] is LoraConfig


def test_a_planted_dead_key_is_an_error_here_and_a_warning_in_runs() -> None:
    loaded = load(["+experiment=quickstart"])
    loaded.lora = PlantedLora(**to_jsonable(loaded.lora))
    watch(loaded)
    read_all_but(loaded, "nobody")
    assert unread(loaded) == ["lora.nobody"]
    with pytest.raises(UnreadSetting, match=r"nothing read lora\.nobody during this run: setting it had no effect"):
        tell_unread(loaded, [])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        tell_unread(loaded, [])
    assert [one.category for one in told] == [UnreadSetting]


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
        watch(config)
    assert "quantization.threshold" in unread(chosen)
    assert "quantization.threshold" not in unread(other)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["train.epochs=3"], ["train.epochs=3 has no effect: train.steps=72 is set"]),
        (["train.epochs=3", "train.steps=null"], []),
        (["quantization=int8", "quantization.bits=3"], ["quantization.bits=3 has no effect: it is hqq's, and quantization.method=int8"]),
        (["quantization=int8", "quantization.double=false"],
         ["quantization.double=false has no effect: it is for nf4 and fp4, and quantization.method=int8"]),
        (["optim.warmup=null", "optim.warmup_steps=2"], ["optim.warmup=null has no effect: optim.warmup_steps=2 is set"]),
        (["export.card.numbers="], ["export.card.numbers= has no effect: left to the format, which may know one kind only"]),
        (["data.columns={prompt: request}", "launch.heartbeat_timeout_seconds=9", "run.if_exists=resume"], []),
    ],
)  # fmt: skip
def test_what_was_typed_in_vain_is_said_before_the_run_with_its_reason(typed: list[str], said: list[str]) -> None:
    overrides = ["+experiment=quickstart", *typed]
    assert idle(load(overrides), overrides) == said


def test_a_rule_of_what_only_the_run_shows_excuses_no_typed_setting() -> None:
    overrides = ["+experiment=quickstart", "data.checks.largest_label_share=0.5"]
    loaded = load(overrides)
    watch(loaded)
    key = "data.checks.largest_label_share"
    assert (key in unread(loaded, overrides), key in unread(loaded)) == (True, False)


def test_data_settings_count_as_read_where_the_cache_has_what_was_made_with_them(config: RunConfig) -> None:
    assert {"data.max_tokens", "data.checks.secret_share"} <= set(unread(config))
    credit(config.data)
    assert not [key for key in unread(config) if key.startswith("data.")]


def test_every_rule_is_about_settings_that_exist_and_says_why() -> None:
    known = set(paths(RunConfig))
    for rule in BY_DESIGN:
        assert rule.why
        for key in rule.keys:
            assert key.replace(".*", "") in known or unknown(key, RunConfig) is None, key
