"""Settings by the names of transformers, TRL, peft, axolotl and LLaMA-Factory: the hint is right, or there is none."""

import re
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from finetune.config import RunConfig
from finetune.config.fields import resolve_field, resolve_type, unknown_key, value_problems
from finetune.config.other_names import OTHER_NAMES, typed
from finetune.config.overrides import group_options, override_problems
from finetune.paths import CONF

TYPED = {
    "gradient_accumulation_steps=4": "train.rows_per_step?",
    "per_device_train_batch_size=2": "train.micro_batch=2?",
    "micro_batch_size=2": "train.micro_batch=2?",
    "num_train_epochs=3": "train.epochs=3?",
    "num_epochs=3": "train.epochs=3?",
    "max_steps=100": "train.steps=100?",
    "max_steps=-1": "train.steps?",
    "learning_rate=1e-4": "optim.learning_rate?",
    "lr_scheduler_type=cosine": "optim.schedule=cosine?",
    "lr_scheduler_type=polynomial": "optim.schedule?",
    "warmup_ratio=0.1": "optim.warmup=0.1?",
    "warmup_steps=10": "optim.warmup_steps?",
    "max_grad_norm=1": "optim.max_grad_norm?",
    "optimizer=adamw_bnb_8bit": "optim.name=adamw_8bit?",
    "lora_r=16": "lora.rank=16?",
    "lora_alpha=32": "lora.alpha=32?",
    "lora_dropout=0.05": "lora.dropout=0.05?",
    "lora_target_modules=[q_proj,v_proj]": "lora.targets=[q_proj,v_proj]?",
    "lora_target=all": "lora.targets=[all-linear]?",
    "use_dora=true": "lora.variant=dora?",
    "load_in_4bit=true": "quantization=nf4_double?",
    "load_in_8bit=true": "quantization=int8?",
    "quantization_bit=4": "quantization=nf4_double?",
    "bf16=true": "model.dtype=bfloat16?",
    "fp16=true": "model.dtype=float16?",
    "base_model=org/x": "model.name=org/x?",
    "model_name_or_path=org/x": "model.name=org/x?",
    "sequence_len=2048": "data.max_tokens=2048?",
    "cutoff_len=2048": "data.max_tokens=2048?",
    "max_length=2048": "data.max_tokens=2048?",
    "packing=true": "data.packing?",
    "sample_packing=true": "data.packing=true?",
    "train_on_inputs=false": "data.train_roles=[assistant]?",
    "val_set_size=0.05": "data.heldout_share=0.05?",
    "dataset_name=org/rows": "data.hub=org/rows?",
    "gradient_checkpointing=true": "train.checkpointing=full?",
    "save_steps=500": "train.save_steps=500?",
    "eval_steps=100": "train.eval_steps=100?",
    "logging_steps=10": "train.log_steps=10?",
    "save_total_limit=3": "train.keep_checkpoints=3?",
    "seed=42": "run.seed?",
    "report_to=wandb": "tracking=[wandb]?",
    "report_to=none": "tracking=[]?",
    "report_to=mlflow": "tracking=[mlflow]?",
    "output_dir=out": "run.name?",
    "flash_attention=true": "model.attention=flash_attention_2?",
    "hub_model_id=me/x": "export.hub.repository=me/x?",
    "beta=0.1": "train.preference.beta=0.1?",
    "deepspeed=ds.json": None,
    "tf32=true": None,
    "dataloader_num_workers=4": None,
    "ddp_timeout=180": None,
    "adam_epsilon=1e-8": None,
    "logging_dir=logs": None,
    "remove_unused_columns=false": None,
}
"""What users type, and what the hint has to be; None: nothing here does this, so no setting may be named."""


@pytest.mark.parametrize("word", TYPED)
def test_a_name_of_another_tool_gets_the_right_hint_or_none(word: str) -> None:
    (problem,) = override_problems([word], RunConfig, [CONF])
    wanted = TYPED[word]
    if wanted is None:
        assert "did you mean" not in problem
    else:
        assert f"there is no such setting; did you mean {wanted}" in problem


def test_rows_of_a_step_are_said_with_their_unit() -> None:
    problem = unknown_key("gradient_accumulation_steps", RunConfig, 4) or ""
    assert "rows of a micro-batch x GPUs x accumulation" in problem
    assert "train.tokens_per_step=null" in problem


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_the_table_names_settings_and_groups_that_exist(name: str) -> None:
    key = OTHER_NAMES[name].setting
    if "." in key and not key.startswith(("tracking.", "export.")):
        resolve_field(key, RunConfig)
    else:
        group, _, rest = key.partition(".")
        assert (CONF / group).is_dir()
        assert not rest or resolve_field(f"{group}.x.{rest.partition('.')[2]}", RunConfig)


PROBES: tuple[Any, ...] = (
    True,
    False,
    "auto",
    "no",
    4,
    8,
    0.1,
    "nf4",
    "cosine",
    "adamw_torch",
    "qlora",
    "dpo",
    "wandb",
)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_values_that_the_table_makes_are_valid_here(name: str) -> None:
    other = OTHER_NAMES[name]
    for probe in PROBES:
        here = other.here(probe)
        if here is None or here is probe:
            continue
        if (CONF / other.setting).is_dir():
            assert (
                {here} <= set(group_options(other.setting, [CONF]))
                if isinstance(here, str)
                else here in ([], [probe], ["tensorboard"])
            )
        else:
            assert not list(value_problems(other.setting, resolve_type(other.setting, RunConfig), here))
            assert OverridesParser.create().parse_override(f"{other.setting}={typed(here)}")


def test_no_key_of_ours_is_in_the_table() -> None:
    assert not [name for name in OTHER_NAMES if re.search(r"[.=]", name)]
