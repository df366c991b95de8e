"""Every setting is used by a run: a shipped YAML file gives it a value, or a test sets it on the command line."""

import re
from pathlib import Path

from finetune.config import RunConfig
from finetune.config.fields import all_keys

ROOT = Path(__file__).parents[1]
STARTS_A_RUN = re.compile(r"\bmain\(|\"-m\", \"finetune|read_tracking|fixtures\.overrides")
REFUSALS = ("test_main.py", "test_checks.py", "test_compatibility.py")
"""Tests of command lines that are refused."""

NOT_YET = {
    "data.sources.rows", "data.sources.weight", "merge.adapters", "train.preference.desirable_weight",
    "eval.harness.batch_rows", "eval.harness.chat", "eval.harness.include_path", "eval.harness.shots",
    "eval.harness.tasks", "export.repository", "export.shard_bytes", "launch.grace_seconds", "launch.host",
    "launch.port", "lora.calibration_tokens", "optim.decay", "optim.lora_plus_ratio", "optim.warmup_tokens",
    "plan.exact", "plan.fit", "quantization.skip_modules",
    "quantization.skip_modules_tokens", "sweep.prune", "sweep.prune_after_jobs", "sweep.prune_after_steps",
    "tracking.artifacts", "tracking.entity", "tracking.tags", "train.preference.label_smoothing",
    "train.preference.undesirable_weight",
}  # fmt: skip
"""Settings that only tests of a function read, not one of the command line: to become fewer, never more."""


def shipped(group: str) -> str:
    """The YAML files of a group, and the experiments."""
    files = [file for folder in (group, "experiment") for file in sorted((ROOT / "conf" / folder).rglob("*.yaml"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def test_settings_that_no_run_uses_are_known_and_become_fewer() -> None:
    keys = set(all_keys(RunConfig))
    settings = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    tests = (file for file in sorted((ROOT / "tests").rglob("*.py")) if file.name not in REFUSALS)
    typed = "\n".join(
        text for text in (file.read_text(encoding="utf-8") for file in tests) if STARTS_A_RUN.search(text)
    )
    unused = {
        key
        for key in settings
        if not re.search(rf"[\[\"'+~ ]{re.escape(key)}=", typed)
        and not re.search(rf"(?m)^\s*{re.escape(key.rpartition('.')[2])}:", shipped(key.partition(".")[0]))
    }
    assert unused == NOT_YET
