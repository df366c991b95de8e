"""Figures and names as a reader wants them."""

from collections.abc import Mapping
from typing import Any

from finetune.console import human_bytes

MISSING = "–"
ARTIFACTS = {
    "base": "Base model",
    "base_quantized": "Base, quantized",
    "adapter": "Quantized + adapter",
    "merged": "Merged model",
}
CHANGES = {
    "quantization": "Cost of quantization",
    "tuning": "Gain of tuning",
    "merge": "Cost of the merge",
    "total": "Base to merged",
}
STAGES = {
    "plan": "plan",
    "data": "prepare data",
    "model": "load model",
    "preflight": "preflight",
    "train": "train",
    "merge": "merge",
    "eval": "evaluate",
    "export": "export",
    "report": "report",
}
METRICS = {
    "exact_match": "Whole answer right",
    "json_exact": "Whole answer right",
    "json_fields": "Fields right",
    "json_valid": "Valid JSON",
    "label": "Right label",
    "number": "Right number",
    "number_given": "Gives a number",
    "label_known": "Known label",
    "code_valid": "Valid Python",
    "pass_at_1": "Tests passed",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "token_f1": "Words right (F1)",
}


def stage_title(stage: str) -> str:
    """``eval`` -> ``evaluate``."""
    return STAGES.get(stage, stage)


def metric_title(name: str) -> str:
    """``valid_json`` -> ``Valid JSON``."""
    return METRICS.get(name, name.replace("_", " ").capitalize())


def number(value: float | None, *, digits: int = 3) -> str:
    """Three significant digits, thousands apart: ``13.6``, ``0.000081``, ``207,000,000``."""
    if value is None:
        return MISSING
    if value != value or abs(value) == float("inf"):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    if abs(value) < 1e-6:
        return f"{value:.1e}"
    text = f"{value:.{digits}g}"
    return f"{value:.7f}".rstrip("0") if "e" in text else text


def count(value: float | None) -> str:
    """``134515008`` -> ``134,515,008``."""
    return MISSING if value is None else f"{value:,.0f}"


def millions(value: float | None) -> str:
    """``134515008`` -> ``134.5 million``."""
    if value is None:
        return MISSING
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.1f} {name}"
    return count(value)


def size(count_bytes: float | None) -> str:
    """``269060552`` -> ``256.6 MiB``."""
    return MISSING if count_bytes is None else human_bytes(count_bytes)


def percent(share: float | None, *, digits: int = 1) -> str:
    """``0.6375`` -> ``63.7 %``."""
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """``252`` -> ``4 min 12 s``."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def is_share(values: list[float]) -> bool:
    """Whether figures read best as percentages: all between 0 and 1."""
    return all(0 <= value <= 1 for value in values)


def figure(value: float | None, *, share: bool) -> str:
    """A metric's value, as a percentage where it is a share."""
    return percent(value) if share else number(value)


def signed(value: float | None, *, share: bool) -> str:
    """A difference with its sign; shares differ by percentage points."""
    if value is None:
        return MISSING
    sign = "+" if value > 0 else "−" if value < 0 else "±"
    return f"{sign}{100 * abs(value):.1f} points" if share else f"{sign}{number(abs(value))}"


def interval(found: Mapping[str, Any] | None, *, share: bool) -> str:
    """``54.1 to 70.6 %``, the 95 % interval of a metric."""
    if not found or found.get("low") is None or found.get("high") is None:
        return ""
    if share:
        return f"{100 * found['low']:.1f} to {100 * found['high']:.1f} %"
    return f"{number(found['low'])} to {number(found['high'])}"
