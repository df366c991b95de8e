"""Commands that only read: run folders, and the configuration itself."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from finetune.cli.command import Invocation
from finetune.cli.settings import saved_overrides
from finetune.config import RunConfig, compose, load
from finetune.console import log
from finetune.errors import EXIT_OK, ConfigError
from finetune.hardware import HardwareConfig, Machine
from finetune.hardware.probe import named
from finetune.paths import CONF
from finetune.plan.cards import CARDS, cards_table


def write_report(invocation: Invocation) -> int:
    """Writes the report from what the run folder holds: ``report run.name=x``."""
    from finetune.report import report

    config = _saved_config(invocation)
    report(Path(config.run.root) / config.run.name)
    return EXIT_OK


def write_sweep_report(invocation: Invocation) -> int:
    """Prints the table of a sweep from what its jobs' folders hold: ``report --sweep x``."""
    from finetune.report.sweep import report_sweep

    root = Path(invocation.setting_values().get("run.root", "outputs"))
    report_sweep(root / invocation.options["sweep"])
    return EXIT_OK


def compare_scores(invocation: Invocation) -> int:
    """Compares two runs on the rows that both were evaluated on: ``eval run.name=a --compare b``."""
    from finetune.eval.compare import compare
    from finetune.report.compare import show_comparison

    config = _saved_config(invocation)
    root = Path(config.run.root)
    comparison = compare(root / config.run.name, root / invocation.options["compare"], seed=config.run.seed)
    show_comparison(comparison, root / config.run.name / "eval" / f"compare-{comparison['runs'][1]}.html")
    return EXIT_OK


def explain_setting(invocation: Invocation) -> int:
    """Prints who set a setting, and what it would be otherwise: ``plan --explain lora.rank``."""
    from finetune.provenance import explain

    explain(invocation.options["explain"], invocation.overrides)
    return EXIT_OK


def plan_cards(invocation: Invocation) -> int:
    """Prints a Markdown table of cards: of every shipped experiment, or of the settings that are typed."""
    if invocation.overrides:
        config = load(invocation.overrides)
        configs = {config.run.name: config}
    else:
        names = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
        configs = {name: load([f"+experiment={name}"]) for name in names}
    sys.stdout.write("\n".join(cards_table(configs, card_machines())) + "\n")
    return EXIT_OK


def card_machines() -> dict[str, Machine]:
    """Returns the machines of the table of cards by the name of their column."""
    options = {card: CONF / "hardware" / f"{option}.yaml" for card, option in CARDS.items()}
    return {card: named(HardwareConfig(**yaml.safe_load(file.read_text()))) for card, file in options.items()}


def diff(invocation: Invocation) -> int:
    """Prints what differs between two runs: ``diff a b``."""
    from finetune.provenance import compare

    root = Path(invocation.setting_values().get("run.root", "outputs"))
    one, two = (Path(name) if "/" in name else root / name for name in invocation.arguments)
    compare(one, two, as_json=invocation.options["json"])
    return EXIT_OK


def explain_row(invocation: Invocation) -> int:
    """Prints what became of one row: ``data --why train.jsonl:3``."""
    from finetune.data import explain
    from finetune.model.base import find
    from finetune.model.load import load_tokenizer

    requested = compose(invocation.overrides)
    folder = _prepared(Path(requested.run.root) / requested.run.name)
    config = load(saved_overrides([f"run.root={folder.parent}", f"run.name={folder.name}"]))
    typed = {override.split("=", 1)[0].lstrip("+") for override in invocation.overrides}
    source, other = config.data, requested.data
    if typed & {"data.path", "data.hub"} and (source.path, source.hub) != (other.path, other.hub):
        raise ConfigError(
            f"data.path: {folder} was prepared from {source.path or source.hub}, not from {other.path or other.hub}; "
            "run `finetune data` with the same settings first, or give its run.name"
        )
    log("data", f"as prepared in {folder}")
    tokenizer = load_tokenizer(find(config.model), template=config.model.template)
    explain(folder / "data", invocation.options["why"], tokenizer=tokenizer)
    return EXIT_OK


def _saved_config(invocation: Invocation) -> RunConfig:
    return load([*saved_overrides(invocation.overrides), *invocation.overrides])


def _prepared(folder: Path) -> Path:
    """The run, or the preview of its data, that was prepared last."""
    folders = (folder, folder.with_name(f"{folder.name}-data"))
    ledgers = [ledger for path in folders if (ledger := path / "data" / "ledger.parquet").is_file()]
    if not ledgers:
        raise ConfigError(
            f"run.name: {folder} holds no prepared data; run `finetune data` with the same settings first"
        )
    return max(ledgers, key=lambda ledger: ledger.stat().st_mtime).parent.parent
