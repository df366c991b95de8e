"""Compares merging a large checkpoint with ``cp`` and peft: ``python -m benchmarks.merge [--parameters 3e9]``.

Each contender works in its own process, so that its peak memory is counted separately.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from finetune.console import human_bytes, log, table
from finetune.errors import MergeError
from finetune.inference.fresh_process import run_in_fresh_process, serve_request

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY = 4096, 11008, 32, 32, 32000
"""Widths of Llama 2 7B; the number of layers follows from the requested size."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARD_LAYERS = 4
RANK = 16
MODULE = "benchmarks.merge"
PROMPT = list(range(1, 33))


def compare_merges(*, parameters: float = 3e9, folder: Path | None = None) -> dict[str, Any]:
    """Measures the contenders; the last line printed is the result as JSON.

    Args:
        parameters: Size of the checkpoint of random bfloat16 weights; the disk holds three of them at a time.
        folder: Where to work; None for the system's temporary folder.

    Returns:
        ``peak_rss_bytes``, ``ratio_to_cp`` (of throughput), ``ratio_to_peft_rss`` and ``max_logit_difference``.

    Raises:
        MergeError: The disk is too small.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-bench-", dir=folder) as scratch:
        work = Path(scratch)
        free = shutil.disk_usage(work).free
        if free < 3 * 2.2 * parameters:
            need = human_bytes(6.6 * parameters)
            raise MergeError(
                f"benchmarks.merge needs {need} of disk in {work.parent} and {human_bytes(free)} are free; "
                "lower --parameters"
            )
        base = _run(work, "make", layers=layers_for(parameters))
        size = f"{base['parameters']:,} random weights, {human_bytes(base['bytes'])} in {base['files']} files"
        log("bench", f"a Llama of {base['layers']} layers, {size}")
        copied = _copy_seconds(work / "base", work / "copy")
        shutil.rmtree(work / "copy")
        ours = _run(work, "ours") | _run(work, "logits", model="ours")
        peft = _run(work, "peft") | _run(work, "logits", model="peft")
    rows = [
        ["cp", f"{copied:.1f}", ""],
        ["finetune, original + BA", f"{ours['seconds']:.1f}", human_bytes(ours["peak_rss_bytes"])],
        ["peft merge_and_unload", f"{peft['seconds']:.1f}", human_bytes(peft["peak_rss_bytes"])],
    ]
    table("bench", ["", "seconds", "peak memory"], rows)
    difference = max(abs(a - b) for a, b in zip(ours["logits"], peft["logits"], strict=True))
    largest = max(map(abs, peft["logits"]))
    log("bench", f"logits of the two merged models differ by at most {difference:.5f}; the largest is {largest:.3f}")
    result = {
        "peak_rss_bytes": ours["peak_rss_bytes"],
        "ratio_to_cp": round(copied / ours["seconds"], 3),
        "ratio_to_peft_rss": round(ours["peak_rss_bytes"] / peft["peak_rss_bytes"], 4),
        "max_logit_difference": round(difference, 5),
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return result


def _run(work: Path, mode: str, **request: Any) -> dict[str, Any]:
    return run_in_fresh_process(MODULE, {"mode": mode, "folder": work, **request}, work=work)


def layers_for(parameters: float) -> int:
    """Returns the number of layers, at least one, whose model is nearest to a size."""
    layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * KEY_VALUE_HEADS // HEADS + 3 * HIDDEN * INTERMEDIATE
    return max(1, round((parameters - 2 * VOCABULARY * HIDDEN) / layer))


def _copy_seconds(source: Path, target: Path) -> float:
    started = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in target.iterdir():  # ours is on the disk when it returns, so the copy must be too
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    return time.monotonic() - started


def _work(request: dict[str, Any]) -> dict[str, Any]:
    modes = {"make": _make, "ours": _ours, "peft": _peft, "logits": _logits}
    return modes[request["mode"]](request)


def _shapes(layers: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns tensor shapes by file, named as in Llama's checkpoints."""
    narrow = HIDDEN * KEY_VALUE_HEADS // HEADS
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for layer in range(layers):
        file = files.setdefault(f"model-{layer // SHARD_LAYERS:05d}.safetensors", {})
        prefix = f"model.layers.{layer}"
        for name, shape in {
            "q_proj": (HIDDEN, HIDDEN),
            "k_proj": (narrow, HIDDEN),
            "v_proj": (narrow, HIDDEN),
            "o_proj": (HIDDEN, HIDDEN),
        }.items():
            file[f"{prefix}.self_attn.{name}.weight"] = shape
        for name, shape in {
            "gate_proj": (INTERMEDIATE, HIDDEN),
            "up_proj": (INTERMEDIATE, HIDDEN),
            "down_proj": (HIDDEN, INTERMEDIATE),
        }.items():
            file[f"{prefix}.mlp.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            file[f"{prefix}.{name}.weight"] = (HIDDEN,)
    ends = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    files["model-ends.safetensors"] = dict(ends)
    return files


def _make(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig

    from finetune.merge.checkpoint import ShardWriter, TensorHeader, write_index

    base = Path(request["folder"]) / "base"
    base.mkdir()
    torch.manual_seed(0)
    files = _shapes(request["layers"])
    shards = {
        file: [TensorHeader(name, torch.bfloat16, shape) for name, shape in tensors.items()]
        for file, tensors in files.items()
    }
    noise = torch.randn(1 << 22).to(torch.bfloat16) * 0.02
    for file, tensors in shards.items():
        with ShardWriter(base / file, tensors) as writer:
            for tensor in tensors:
                count = tensor.size // 2
                ones = torch.ones(count, dtype=torch.bfloat16)
                writer.write(ones if len(tensor.shape) == 1 else noise.repeat(count // len(noise) + 1)[:count])
    write_index(base, shards)
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=request["layers"],
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(base)
    _make_adapter(Path(request["folder"]) / "adapter", files)
    size = sum(tensor.size for tensors in shards.values() for tensor in tensors)
    return {"layers": request["layers"], "parameters": size // 2, "bytes": size, "files": len(files)}


def _make_adapter(folder: Path, files: dict[str, dict[str, tuple[int, ...]]]) -> None:
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for name, shape in ((name, shape) for weights in files.values() for name, shape in weights.items()):
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.02
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(shape[0], RANK) * 0.02
    LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM").save_pretrained(
        str(folder)
    )
    save_file(tensors, folder / "adapter_model.safetensors")


def _ours(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    from finetune.merge.adapter_deltas import read_changes
    from finetune.merge.candidates import build

    folder = Path(request["folder"])
    started = time.monotonic()
    build(folder / "base", read_changes(folder / "adapter"), folder / "ours", dtype=torch.bfloat16)
    return {"seconds": time.monotonic() - started, "peak_rss_bytes": _peak_bytes()}


def _peft(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = Path(request["folder"])
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload().save_pretrained(folder / "peft")
    return {"seconds": time.monotonic() - started, "peak_rss_bytes": _peak_bytes()}


def _logits(request: dict[str, Any]) -> dict[str, Any]:
    """Returns the logits after a fixed prompt and deletes the merged files to free disk space."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(request["folder"]) / request["model"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].float().tolist()
    del model
    shutil.rmtree(folder)
    return {"logits": logits}


def _peak_bytes() -> int:
    """Returns the largest resident memory of this process. Source: getrusage(2), KiB on Linux and bytes on macOS."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=3e9, help="size of the checkpoint")
    compare_merges(parameters=parser.parse_args().parameters)


if __name__ == "__main__":
    if sys.argv[-1].endswith("result.json"):  # a contender: the request and result files of run_in_fresh_process
        serve_request(_work)
    else:
        main()
