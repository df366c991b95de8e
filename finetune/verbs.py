"""Verbs that only read what is there: run folders, and the configuration itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from finetune.config import load
from finetune.console import log
from finetune.errors import ConfigError

Settings = dict[str, str]

OWN = {
    "data": ("why",),
    "eval": ("compare",),
    "plan": ("explain", "fit", "exact"),
    "replay": ("force",),
    "diff": ("json",),
    "report": ("sweep",),
}
"""Settings of a verb itself."""

SWITCHES = ("fit", "exact", "force", "json")
"""Those of them that are true or false."""


def split_own(verb: str, arguments: list[str]) -> tuple[Settings, list[str]]:
    """Settings of a verb itself, like ``data why=train.jsonl:3``, apart from the overrides.

    Raises:
        ConfigError: One has no value or a wrong one, or asks for something else than another does.
    """
    names = OWN.get(verb, ())
    given = [argument.partition("=") for argument in arguments]
    own = {
        name: value.lower() if name in SWITCHES else value for name, equals, value in given if equals and name in names
    }
    problems = [
        f"{verb} {name}: it needs a value, e.g. {name}={'true' if name in SWITCHES else '...'}"
        for name in names
        if name in arguments
    ]
    for name, value in own.items():
        others = [other for other in own if other != name]
        if name in SWITCHES and value not in ("true", "false"):
            problems.append(f"{verb} {name} must be true or false; got {value!r}")
        if (verb, name) in LOOKS and others:
            problems.append(f"{verb} {name}={value} stands alone; leave out {', '.join(others)}")
    if problems:
        raise ConfigError(*problems)
    return own, [argument for argument in arguments if argument.split("=", 1)[0] not in names]


def settings_of(what: str, overrides: list[str], *, takes: tuple[str, ...], example: str) -> Settings:
    """The settings of a verb that takes few of them.

    Raises:
        ConfigError: There are others.
    """
    wrong = [
        override for override in overrides if override.split("=", 1)[0].lstrip("+") not in takes or "=" not in override
    ]
    if wrong:
        raise ConfigError(
            f"{what}: {' '.join(wrong)} would have no effect; it takes {', '.join(takes)}, e.g. finetune {example}"
        )
    return dict(override.lstrip("+").split("=", 1) for override in overrides)


def report_again(own: Settings, overrides: list[str]) -> bool:
    """``report run.name=x``: the page from what the run folder holds."""
    from finetune.report import report

    config = load(with_experiment([*recorded(overrides), *overrides]))
    report(Path(config.run.root) / config.run.name)
    return True


def sweep(arguments: list[str]) -> bool:
    """``--multirun lora.rank=8,16``: the jobs one by one, then their table; whether all came through."""
    from finetune.report.sweep import report_sweep
    from finetune.sweep.verb import sweep as start

    return report_sweep(start(arguments))


def sweep_again(own: Settings, overrides: list[str]) -> bool:
    """``report sweep=x``: the table of a sweep from what its jobs' folders hold."""
    from finetune.report.sweep import report_sweep

    settings = settings_of(
        "report sweep", overrides, takes=("run.root",), example=f"report sweep={own['sweep']} run.root=outputs"
    )
    report_sweep(Path(settings.get("run.root", "outputs")) / own["sweep"])
    return True


def compare_scores(own: Settings, overrides: list[str]) -> bool:
    """``eval run.name=a compare=b``: two runs on the rows that both were measured on."""
    from finetune.eval.compare import compare
    from finetune.report.compare import show_comparison

    settings_of(
        "eval compare",
        overrides,
        takes=("run.name", "run.root", "run.seed", "experiment"),
        example="eval run.name=a compare=b",
    )
    config = load(with_experiment([*recorded(overrides), *overrides]))
    root = Path(config.run.root)
    comparison = compare(root / config.run.name, root / own["compare"], seed=config.run.seed)
    show_comparison(comparison, root / config.run.name / "eval" / f"compare-{comparison['runs'][1]}.html")
    return True


def explain_setting(own: Settings, overrides: list[str]) -> bool:
    """``plan explain=lora.rank``: who set it, and what it would be otherwise."""
    from finetune.provenance import explain

    explain(own["explain"], with_experiment(overrides))
    return True


def diff(own: Settings, overrides: list[str]) -> bool:
    """``diff a b``: what differs between two runs."""
    from finetune.provenance import compare

    names = [word for word in overrides if "=" not in word]
    settings = settings_of(
        "diff", [word for word in overrides if "=" in word], takes=("run.root",), example="diff a b json=true"
    )
    root = Path(settings.get("run.root", "outputs"))
    if len(names) != 2:
        raise ConfigError(
            f"diff: name two runs, e.g. finetune diff a b (and json=true); got {' '.join(overrides) or 'nothing'}"
        )
    compare(*[Path(name) if "/" in name else root / name for name in names], as_json=own.get("json") == "true")
    return True


def replay(own: Settings, overrides: list[str]) -> bool:
    """``replay run.name=x``: the run again, held against itself; false where it does not come out as it did."""
    from finetune import provenance

    settings = settings_of("replay", overrides, takes=("run.name", "run.root"), example="replay run.name=a force=true")
    root, name = Path(settings.get("run.root", "outputs")), settings.get("run.name")
    if name is None:
        raise ConfigError("replay: say run.name=<a finished run>; got none")
    from finetune.launch import Ranks
    from finetune.pipeline import describe_environment, run

    return provenance.replay(
        root / name,
        run=partial(run, ranks=Ranks({})),
        surroundings=describe_environment,
        force=own.get("force") == "true",
    ).holds


def explain_row(own: Settings, overrides: list[str]) -> bool:
    """``data why=train.jsonl:3``: what became of one row."""
    from finetune.data import explain
    from finetune.model import fetch
    from finetune.model.load import load_tokenizer

    asked = load(with_experiment(overrides))
    folder = prepared(Path(asked.run.root) / asked.run.name)
    config = load(with_experiment(recorded([f"run.root={folder.parent}", f"run.name={folder.name}"])))
    given = {override.split("=", 1)[0].lstrip("+") for override in overrides}
    if given & {"data.path", "data.hub"} and (asked.data.path, asked.data.hub) != (config.data.path, config.data.hub):
        raise ConfigError(
            f"data.path: {folder} was prepared from {config.data.path or config.data.hub}, not from {asked.data.path or asked.data.hub}; "
            "run `finetune data` with the same settings first, or give its run.name"
        )
    log("data", f"as prepared in {folder}")
    explain(folder / "data", own["why"], tokenizer=load_tokenizer(fetch(config.model)))
    return True


def prepared(folder: Path) -> Path:
    """The run, or the look at its data, that was prepared last."""
    there = [
        path
        for path in (folder, folder.with_name(f"{folder.name}-data"))
        if (path / "data" / "ledger.parquet").is_file()
    ]
    if not there:
        raise ConfigError(
            f"run.name: {folder} holds no prepared data; run `finetune data` with the same settings first"
        )
    return max(there, key=lambda path: (path / "data" / "ledger.parquet").stat().st_mtime)


def with_experiment(overrides: list[str]) -> list[str]:
    """Without an experiment, the quickstart."""
    named = any(override.lstrip("+").startswith("experiment=") for override in overrides)
    return overrides if named else ["+experiment=quickstart", *overrides]


def recorded(overrides: list[str]) -> list[str]:
    """What the named run was started with, so that a later verb composes the same."""
    settings = dict(override.split("=", 1) for override in overrides if "=" in override)
    name = settings.get("run.name")
    if name is None:
        return []
    file = Path(settings.get("run.root", "outputs")) / name / "overrides.json"
    if not file.is_file():
        raise ConfigError(
            f"run.name={name}: {file.parent} holds no run; start one first, or give the name of one that exists"
        )
    return [
        str(override)
        for override in json.loads(file.read_text(encoding="utf-8"))
        if not override.startswith("run.if_exists=")
    ]


LOOKS: dict[tuple[str, str], Callable[[Settings, list[str]], bool]] = {
    ("report", ""): report_again,
    ("report", "sweep"): sweep_again,
    ("diff", ""): diff,
    ("replay", ""): replay,
    ("data", "why"): explain_row,
    ("eval", "compare"): compare_scores,
    ("plan", "explain"): explain_setting,
}
"""By verb, and by the setting of its own that asks for it; whether all is well."""
