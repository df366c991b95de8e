"""Trains with TRL's SFTTrainer, tuned by hand, on the rows that a run of this project has prepared.

python -m benchmarks.gpu.trl_sft RUN BASE FOLDER STEPS PACK_TOKENS ACCUMULATE

Packing, the fastest attention that is installed, and no checkpointing where the memory allows it. The last line is
JSON.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.gpu.check import warm_steps
from finetune.inference.collate import split_documents

CUDA = torch.cuda.is_available()


class Clock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def train(run: Path, base: Path, folder: Path, *, shape: tuple[int, int, int], checkpointing: bool) -> dict[str, Any]:
    """Trains and saves the adapter; returns speed, memory and losses.

    Args:
        run: Of this project; its documents are trained on, with their labels.
        base: The base's folder.
        folder: Receives the adapter.
        shape: Steps, tokens of a packed row, micro-batches of a step.
        checkpointing: Whether layers are recomputed.
    """
    steps, pack_tokens, accumulate = shape
    device = "cuda" if CUDA else "cpu"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    attention = "flash_attention_2" if CUDA and importlib.util.find_spec("flash_attn") else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.bfloat16,
        quantization_config=quantization,
        device_map={"": device},
        attn_implementation=attention,
    )
    rows = [
        {"input_ids": ids, "labels": labels}
        for row in load_from_disk(str(run / "data" / "train"))
        for ids, labels in split_documents(row)
    ]
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulate,
            max_length=pack_tokens,
            packing=True,
            activation_checkpointing=checkpointing,
            bf16=CUDA,
            use_cpu=not CUDA,
            optim="adamw_8bit",
            learning_rate=2e-4,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    trainer.save_model(str(folder))
    packs: Any = trainer.train_dataset
    mean_tokens = sum(len(row["input_ids"]) for row in packs) / len(packs)
    warm = warm_steps(steps)
    seconds = clock.ends[-1] - clock.ends[warm - 1]
    return {
        "tokens_per_second": round((len(clock.ends) - warm) * accumulate * mean_tokens / seconds, 1),
        "peak_bytes": torch.cuda.max_memory_reserved() if CUDA else 0,
        "attention": attention,
        "checkpointing": checkpointing,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def main(run: str, base: str, folder: str, *numbers: str) -> dict[str, Any]:
    """Trains without checkpointing, and with it where memory is too small."""
    steps, pack_tokens, accumulate = (int(number) for number in numbers)
    shape = steps, pack_tokens, accumulate
    try:
        return train(Path(run), Path(base), Path(folder), shape=shape, checkpointing=False)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    return train(Path(run), Path(base), Path(folder), shape=shape, checkpointing=True)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
