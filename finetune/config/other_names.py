"""What other tools call a setting: one table for the hints about unknown settings and for ``finetune convert``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.objectives import OBJECTIVES
from finetune.tracking.config import KINDS

ABSENT = object()
"""Stands for a value that was not given: None is one."""


@dataclass(frozen=True, slots=True)
class OtherName:
    """What a setting of transformers, TRL, peft, axolotl or LLaMA-Factory is here.

    Attributes:
        setting: Its key here, or the group that is chosen.
        rule: What differs, e.g. the unit; empty where name and value say it all.
        value: Returns the value here for a value there; None where it depends on other settings or has no counterpart.
    """

    setting: str
    rule: str = ""
    value: Callable[[Any], Any] | None = lambda value: value

    def here(self, value: Any) -> Any:
        """Returns the value here; None where there is none."""
        return None if value is ABSENT or self.value is None else self.value(value)


def hint_for(name: str, value: Any = ABSENT) -> str | None:
    """Returns what to write instead of another tool's setting; None where the name is not known.

    Args:
        name: Its last segment.
        value: What was typed, if anything.
    """
    other = OTHER_NAMES.get(name)
    if other is None:
        return None
    here = other.here(value)
    text = f"did you mean {other.setting}{'' if here is None else f'={typed(here)}'}?"
    return f"{text} {other.rule[0].upper()}{other.rule[1:]}" if other.rule else text


def typed(value: Any) -> str:
    """Returns a value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def choose(**values: Any) -> Callable[[Any], Any]:
    """Returns a reader of words; true and false are the words ``true`` and ``false``."""
    return lambda value: values.get(str(value).lower())


def targets(value: Any) -> list[str] | None:
    """Returns the last segments of layers' names; None for regular expressions and what names nothing."""
    if not isinstance(value, str | list):
        return None
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(map(str, value))
    if names in (["all"], ["all-linear"]):
        return ["all-linear"]
    last = [name.rpartition(".")[2] for name in names]
    return last if all(name.replace("_", "").isalnum() for name in last) and _plain(names) else None


def _plain(names: list[str]) -> bool:
    return not any(sign in name for name in names for sign in r"\[]()|^$*+")


def _at_most_one(value: Any) -> Any:
    return value if isinstance(value, float) and 0 < value < 1 else None


def _steps(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _reports(value: Any) -> list[str] | None:
    if not isinstance(value, str | list):
        return None
    names = [value] if isinstance(value, str) else list(map(str, value))
    if names in ([], ["none"]):
        return []
    return names if set(names) <= set(KINDS) else None


def _ratio(value: Any) -> Any:
    return value if type(value) in (int, float) and 0 <= value < 1 else None


def _words(value: Any) -> Any:
    return value if value in ("sdpa", "eager", "flash_attention_2", "flash_attention_3") else None


ON = choose(true=True, false=False)
EVERY_ROLE = ["system", "user", "assistant"]
ROWS_PER_STEP = (
    "it is the rows of one optimizer step: rows of a micro-batch x GPUs x accumulation. Set train.tokens_per_step=null "
    "with it"
)
ADDRESS = "it names a data set of the Hub; a file is data.path"
OPTIMIZER = choose(
    adamw_torch="adamw_torch", adamw_torch_fused="adamw_torch", adamw_hf="adamw_torch", adamw="adamw_torch",
    adamw_bnb_8bit="adamw_8bit", adamw_8bit="adamw_8bit", paged_adamw="paged_adamw_32bit",
    paged_adamw_32bit="paged_adamw_32bit", paged_adamw_8bit="paged_adamw_8bit", lion_8bit="lion_8bit",
    lion_32bit="lion_32bit", paged_lion_8bit="paged_lion_8bit", paged_lion_32bit="paged_lion_32bit",
)  # fmt: skip
SCHEDULE = choose(
    constant="constant", constant_with_warmup="constant", linear="linear", cosine="cosine", warmup_stable_decay="wsd"
)

MODEL = OtherName("model.name")
MAX_TOKENS = OtherName("data.max_tokens")
RANK = OtherName("lora.rank")
MICRO_BATCH = OtherName("train.micro_batch")
TARGETS = OtherName("lora.targets", value=targets)
HUB_DATA = OtherName("data.hub", ADDRESS)
HELDOUT = OtherName("data.heldout_share", "a number of rows is data.heldout_rows", _at_most_one)
PROMPT_TRAINED = OtherName("data.train_roles", value=choose(true=EVERY_ROLE, false=["assistant"]))
ANSWER_TRAINED = OtherName("data.train_roles", value=choose(true=["assistant"], false=EVERY_ROLE))
CHECKPOINTING = OtherName("train.checkpointing", value=choose(true="full", false="none", unsloth="offloaded"))
BETA = OtherName("train.preference.beta")
RUN_NAME = OtherName("run.name")
BFLOAT16 = OtherName("model.dtype", value=choose(true="bfloat16", auto="auto"))
FLOAT16 = OtherName("model.dtype", value=choose(true="float16"))
DOUBLE = OtherName("quantization.double", value=ON)
DORA = OtherName("lora.variant", value=choose(true="dora"))
RSLORA = OtherName("lora.variant", value=choose(true="rslora"))
WORKERS = OtherName("data.workers")
TEMPLATE = OtherName("data.template", "null keeps the tokenizer's own; the names here are those of conf/data/template",
                     None)  # fmt: skip
OBJECTIVE = OtherName("train.objective", value=choose(**{name: name for name in OBJECTIVES}))
PROCESSES = OtherName("launch.processes", "it counts the processes of all machines; choose launch=ddp with it")

OTHER_NAMES = {
    "model_name_or_path": MODEL, "base_model": MODEL, "pretrained_model_name_or_path": MODEL, "model_id": MODEL,
    "model_revision": OtherName("model.revision"), "revision_of_model": OtherName("model.revision"),
    "torch_dtype": OtherName("model.dtype"), "bf16": BFLOAT16, "bfloat16": BFLOAT16, "fp16": FLOAT16,
    "float16": FLOAT16, "attn_implementation": OtherName("model.attention", value=_words),
    "flash_attention": OtherName("model.attention", value=choose(true="flash_attention_2")),
    "flash_attn": OtherName(
        "model.attention", value=choose(auto="auto", fa2="flash_attention_2", sdpa="sdpa", disabled="eager")
    ),
    "trust_remote_code": OtherName("model.remote_code", "it lists the SHA-256 of each file that may run", None),

    "load_in_4bit": OtherName("quantization", value=choose(true="nf4_double", false="none")),
    "load_in_8bit": OtherName("quantization", value=choose(true="int8")),
    "quantization_bit": OtherName("quantization", value=choose(**{"4": "nf4_double", "8": "int8"})),
    "bnb_4bit_quant_type": OtherName("quantization", value=choose(nf4="nf4", fp4="fp4")),
    "bnb_4bit_use_double_quant": DOUBLE, "use_bnb_nested_quant": DOUBLE, "double_quantization": DOUBLE,
    "adapter": OtherName("quantization", value=choose(qlora="nf4_double", lora="none")),

    "r": RANK, "lora_r": RANK, "lora_rank": RANK, "lora_alpha": OtherName("lora.alpha"),
    "lora_dropout": OtherName("lora.dropout"), "target_modules": TARGETS, "lora_target_modules": TARGETS,
    "lora_target": TARGETS, "lora_target_linear": OtherName("lora.targets", value=choose(true=["all-linear"])),
    "use_dora": DORA, "peft_use_dora": DORA, "use_rslora": RSLORA, "peft_use_rslora": RSLORA,
    "pissa_init": OtherName("lora.variant", value=choose(true="pissa")),
    "init_lora_weights": OtherName("lora.variant", value=choose(pissa="pissa", olora="olora", eva="eva",
                                                                loftq="loftq")),
    "loraplus_lr_ratio": OtherName("optim.lora_plus_ratio"),

    "max_length": MAX_TOKENS, "max_seq_length": MAX_TOKENS, "sequence_len": MAX_TOKENS, "cutoff_len": MAX_TOKENS,
    "model_max_length": MAX_TOKENS, "sample_packing": OtherName("data.packing"),
    "neat_packing": OtherName("data.packing"), "train_on_inputs": PROMPT_TRAINED, "train_on_prompt": PROMPT_TRAINED,
    "assistant_only_loss": ANSWER_TRAINED, "completion_only_loss": ANSWER_TRAINED, "val_set_size": HELDOUT,
    "val_size": HELDOUT, "max_samples": OtherName("data.limit"), "max_train_samples": OtherName("data.limit"),
    "dataset_name": HUB_DATA, "dataset": HUB_DATA, "data_files": OtherName("data.path"),
    "train_file": OtherName("data.path"), "dataset_split": OtherName("data.split"),
    "dataset_train_split": OtherName("data.split"), "dataset_text_field": OtherName(
        "data.columns", "it maps a column of the format to one of the file, e.g. {text: content}", None
    ),
    "chat_template": TEMPLATE, "chat_template_path": TEMPLATE, "default_system": OtherName("data.system"),
    "default_system_message": OtherName("data.system"), "preprocessing_num_workers": WORKERS,
    "dataset_num_proc": WORKERS, "dataset_processes": WORKERS,
    "enable_thinking": OtherName("data.thinking", value=choose(true="train", false="off")),
    "dataset_exact_deduplication": OtherName("data.duplicates", value=choose(true="drop", false="keep")),
    "excess_length_strategy": OtherName("data.too_long", value=choose(drop="drop", truncate="truncate",
                                                                      **{"raise": "error"})),

    "per_device_train_batch_size": MICRO_BATCH, "micro_batch_size": MICRO_BATCH, "batch_size": MICRO_BATCH,
    "gradient_accumulation_steps": OtherName("train.rows_per_step", ROWS_PER_STEP, None),
    "per_device_eval_batch_size": OtherName("eval.batch_rows"), "eval_batch_size": OtherName("eval.batch_rows"),
    "num_train_epochs": OtherName("train.epochs"), "num_epochs": OtherName("train.epochs"),
    "max_steps": OtherName("train.steps", value=_steps), "gradient_checkpointing": CHECKPOINTING,
    "use_gradient_checkpointing": CHECKPOINTING,
    "disable_gradient_checkpointing": OtherName("train.checkpointing", value=choose(true="none", false="full")),
    "activation_offloading": OtherName("train.checkpointing", value=choose(true="offloaded", false="full")),
    "neftune_noise_alpha": OtherName("train.neftune_alpha"),
    "logging_steps": OtherName("train.log_steps", value=_steps),
    "save_steps": OtherName("train.save_steps", value=_steps),
    "saves_per_epoch": OtherName("train.checkpoints", "it is a count for the whole run", None),
    "eval_steps": OtherName("train.eval_steps", value=_steps),
    "evals_per_epoch": OtherName("train.evaluations", "it is a count for the whole run", None),
    "save_strategy": OtherName("train.checkpoints", "it is a count for the whole run", choose(no=0, false=0)),
    "eval_strategy": OtherName("train.evaluations", "it is a count for the whole run", choose(no=0, false=0)),
    "evaluation_strategy": OtherName("train.evaluations", "it is a count for the whole run", choose(no=0, false=0)),
    "save_total_limit": OtherName("train.keep_checkpoints"), "early_stopping_patience": OtherName("train.patience"),
    "load_best_model_at_end": OtherName("train.select", value=choose(true="best", false="last")),
    "full_determinism": OtherName("train.deterministic"), "rl": OBJECTIVE, "stage": OBJECTIVE,
    "pref_loss": OtherName("train.preference.loss"), "beta": BETA, "pref_beta": BETA, "rl_beta": BETA,
    "dpo_beta": BETA,

    "lr": OtherName("optim.learning_rate"), "optimizer": OtherName("optim.name", value=OPTIMIZER),
    "optim": OtherName("optim.name", value=OPTIMIZER),
    "lr_scheduler_type": OtherName("optim.schedule", value=SCHEDULE),
    "lr_scheduler": OtherName("optim.schedule", value=SCHEDULE),
    "warmup_ratio": OtherName("optim.warmup", value=_ratio), "adam_beta1": OtherName("optim.beta1"),
    "adam_beta2": OtherName("optim.beta2"),

    "report_to": OtherName("tracking", value=_reports), "wandb_project": OtherName("tracking.wandb.project"),
    "wandb_entity": OtherName("tracking.wandb.entity"), "wandb_mode": OtherName("tracking.wandb.mode"),
    "use_tensorboard": OtherName("tracking", value=choose(true=["tensorboard"])),
    "output_dir": OtherName("run.name", "it is a folder below run.root", None), "run_name": RUN_NAME,
    "wandb_name": RUN_NAME, "wandb_run_name": RUN_NAME, "data_seed": OtherName("run.seed"),
    "resume_from_checkpoint": OtherName("run.if_exists", value=lambda _: "resume"),
    "overwrite_output_dir": OtherName("run.if_exists", value=choose(true="overwrite", false="fail")),
    "hub_model_id": OtherName("export.hub.repository", "choose export=[adapter,card,hub] with it"),
    "push_to_hub": OtherName("export.hub.push", "choose export=[adapter,card,hub] with it", ON),
    "hub_private_repo": OtherName("export.hub.private", "choose export=[adapter,card,hub] with it", ON),
    "fsdp": OtherName("launch", "with launch.processes=<GPUs>", lambda _: "fsdp"),
    "nproc_per_node": PROCESSES, "num_processes": PROCESSES, "num_gpus": PROCESSES,
    "nnodes": OtherName("launch.nodes"), "num_nodes": OtherName("launch.nodes"),
}  # fmt: skip
"""By the last segment of the name there."""
