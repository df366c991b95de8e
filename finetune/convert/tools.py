"""What the three tools do where a file leaves a setting out, and which of their settings need no counterpart here."""

from __future__ import annotations

from typing import Any

from finetune.convert.read import AXOLOTL, LLAMA_FACTORY, TRL

HF_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "seed": 42,
}
"""Source: transformers 5.23, TrainingArguments."""

DEFAULTS: dict[str, dict[str, Any]] = {
    AXOLOTL: {
        "max_grad_norm": 1.0,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "cosine",
        "num_epochs": 1.0,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "sequence_len": 512,
        "sample_packing": False,
        "seed": 42,
    },
    LLAMA_FACTORY: HF_DEFAULTS
    | {
        "learning_rate": 5e-5,
        "cutoff_len": 2048,
        "lora_rank": 8,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "packing": False,
        "disable_gradient_checkpointing": False,
        "excess_length_strategy": "truncate",
    },
    TRL: HF_DEFAULTS
    | {
        "learning_rate": 2e-5,
        "max_length": 1024,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "packing": False,
        "gradient_checkpointing": True,
        "excess_length_strategy": "truncate",
    },
}
"""Where a file leaves them out. Sources: axolotl 067b021, utils/schemas; LLaMA-Factory ff6d4d1, hparams; TRL f2cd577,
trainer/sft_config.py and model_config.py."""

AUTOMATIC = "chosen here by the program"
OUTPUT = "a run folder has all of it"
DISPLAY = "the report has it"
UNNEEDED = {
    **dict.fromkeys(("dataset_prepared_path", "overwrite_cache", "tokenized_path", "dataset_dir"),
                    "prepared data are cached by content"),
    **dict.fromkeys(("plot_loss", "logging_dir", "include_num_input_tokens_seen", "logging_first_step"), DISPLAY),
    **dict.fromkeys(("save_only_model", "save_safetensors", "output_dir", "overwrite_output_dir", "do_train",
                     "do_eval", "save_strategy_steps"), OUTPUT),
    **dict.fromkeys(("tf32", "ddp_timeout", "ddp_find_unused_parameters", "dataloader_num_workers",
                     "dataloader_pin_memory", "gradient_checkpointing_kwargs", "use_reentrant_gc",
                     "low_cpu_mem_usage", "device_map", "model_type", "tokenizer_type", "tokenizer_use_fast",
                     "tokenizer_legacy", "tokenizer_config", "remove_unused_columns", "strict", "local_rank",
                     "pad_to_sequence_len", "eval_sample_packing", "sample_packing_eff_est", "wandb_watch",
                     "sample_packing_seq_len_multiplier", "use_peft", "is_llama_derived_model",
                     "is_mistral_derived_model", "flash_attn_cross_entropy", "flash_attn_rms_norm",
                     "flash_attn_fuse_mlp", "sample_backend", "model_class", "use_cache", "num_workers",
                     "use_v1_kernels", "kernel_config", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
                     "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm",
                     "liger_fused_linear_cross_entropy", "use_liger_kernel", "enable_liger_kernel",
                     "cut_cross_entropy", "quantization_method", "eval_strategy", "evaluation_strategy",
                     "save_strategy", "do_predict"), AUTOMATIC),
}  # fmt: skip
"""Settings that are left out on purpose, each with the reason."""

REASONS = {
    "plugins": "finetune/kernels chooses fused layers and loss",
    "special_tokens": "the tokenizer's own are used; pad never equals a trained end token",
    "tokens": "lora.tokens trains new tokens that the tokenizer has",
    "eot_tokens": "the chat template's end of turn is found and trained on",
    "deepspeed": "ZeRO is refused for 4-bit bases; launch=fsdp launch.processes=<GPUs> shards them",
    "fsdp": "choose launch=fsdp launch.processes=<GPUs> on the command line",
    "fsdp_config": "launch=fsdp has its own settings",
    "fsdp_version": "launch=fsdp has its own settings",
    "lora_modules_to_save": "only adapters are trained; lora.tokens trains rows of the embedding",
    "trust_remote_code": "files are named by their SHA-256: the message of a model that needs it lists them",
    "chat_template": "the tokenizer's own template is used; data.template=<name> takes another",
    "template": "the tokenizer's own template is used; data.template=<name> takes another",
    "processor_type": "text only",
    "resume_from_checkpoint": "run.if_exists=resume continues a run",
    "adam_epsilon": "it is the optimizer's own",
    "unfrozen_parameters": "full fine-tuning is not supported; an adapter is trained",
    "image_max_pixels": "text only",
    "video_max_pixels": "text only",
    "attn_implementation": "model.attention has sdpa, eager, flash_attention_2 and 3",
    "logging_steps": "it must be a whole number of steps",
}  # fmt: skip
"""Why a setting that is known was not translated, or what to use instead."""

FULL = ("full", "freeze")
"""LLaMA-Factory's ``finetuning_type`` that trains the base."""
