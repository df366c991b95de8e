"""Replays a run: does it again from what its folder holds, and compares the outcomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.config import RunConfig
from finetune.config.compose import to_run_config
from finetune.console import log, table
from finetune.errors import ConfigError, FinetuneError, GateMissed
from finetune.provenance.difference import Difference, differences, named
from finetune.run import RunFolder

SUFFIX = "-replay"
VERSIONS = ("python", "versions")
"""Parts of environment.json that must be equal, as must the code."""

MACHINE = ("platform", "machine", "placement")
"""Parts that may differ; results then differ in their last bits."""

FREE = ("machine.disk_free_bytes",)
"""Keys that never matter."""

REPLACED = ("run.name=", "run.root=", "run.if_exists=", "run.until=")
"""Overrides that a replay replaces with its own."""

Run = Callable[..., RunFolder]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a replay.

    Attributes:
        equal: Adapter, losses and scores are the same to the bit.
        within: Every score lies in the interval that the first run gave for it.
        alike: Nothing differed that could change a bit, so equality was expected.
    """

    equal: bool
    within: bool
    alike: bool

    @property
    def holds(self) -> bool:
        """Whether the run came out as close as could be expected."""
        return self.equal or (self.within and not self.alike)


def replay(
    folder: Path, *, run: Run, describe_environment: Callable[[RunConfig], dict[str, Any]], force: bool
) -> Outcome:
    """Runs a finished run again as ``<name>-replay``, and prints how the outcomes compare.

    Args:
        folder: The run's folder.
        run: `finetune.pipeline.run`.
        describe_environment: Returns the content that environment.json would have now.
        force: Continues where code, versions, base or data differ, after printing it.

    Raises:
        ConfigError: The run is not finished.
        FinetuneError: Something differs that decides the outcome.
    """
    config = load_finished(folder)
    before = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    changed = differences({"environment": named(before)}, {"environment": named(describe_environment(config))})
    machine = [_sentence(item) for item in changed if _is(item, MACHINE) and item.key not in FREE]
    if machine:
        log("replay", f"another machine, so the last bits may differ: {'; '.join(machine)}")
    differing = [*_code(changed), *[_sentence(item) for item in changed if _is(item, VERSIONS)], *_base(config, folder)]
    _stop_if(differing, folder, force=force)

    words = [
        word
        for word in json.loads((folder / "overrides.json").read_text(encoding="utf-8"))
        if not word.startswith(REPLACED)
    ]
    config.run.name, config.run.root, config.run.if_exists = folder.name + SUFFIX, str(folder.parent), "overwrite"
    words += [f"run.root={config.run.root}", f"run.name={config.run.name}"]
    until, config.run.until = config.run.until, "data"
    again = run(config, overrides=words).path
    differing += (data := _data(folder, again))
    _stop_if(data, folder, force=force)
    config.run.until, config.run.if_exists = until, "resume"
    with suppress(GateMissed):  # a replay asks whether the outcome is the same, not whether it is good enough
        run(config, overrides=words)
    return judge(folder, again, alike=not machine and not differing)


def load_finished(folder: Path) -> RunConfig:
    """Reads the configuration of a finished run from its folder.

    Raises:
        ConfigError: There is no finished run, or its configuration is not one of this version.
    """
    missing = [name for name in ("config.yaml", "environment.json", "overrides.json") if not (folder / name).is_file()]
    if missing or RunFolder(folder).manifest("train") is None:
        what = f"has no {', '.join(missing)}" if missing else "has not trained to the end"
        raise ConfigError(f"run.name: {folder} {what}, so there is nothing to replay; give the name of a finished run")
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return to_run_config(OmegaConf.merge(OmegaConf.structured(RunConfig), content))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"{folder / 'config.yaml'} is not a configuration of this version ({first}); "
            "check out the commit in environment.json"
        ) from error


def judge(folder: Path, again: Path, *, alike: bool) -> Outcome:
    """Compares two finished runs and prints the comparison.

    The bound of a score is its interval in the first run's evaluation. Where nothing differed (``alike``), all must be
    equal to the bit.
    """
    one, two = RunFolder(folder), RunFolder(again)
    first, second = one.manifest("train"), two.manifest("train")
    if first is None or second is None:
        raise ConfigError(
            f"{folder if first is None else again} has not trained to the end, so there is no outcome to compare"
        )
    adapter = _adapters(folder, again)
    rows, within = (
        [["adapter", first["product"]["adapter_sha256"][:12], second["product"]["adapter_sha256"][:12], adapter, "0"]],
        True,
    )
    for name in ("first_loss", "final_loss"):
        was, now = first["product"][name], second["product"][name]
        rows.append([f"train {name}", f"{was:.6g}", f"{now:.6g}", _change(was, now), ""])
    for name, was, low, high, now in _scores(one, two):
        inside = low <= now <= high
        within = within and inside
        rows.append(
            [
                f"eval {name}",
                f"{was:.6g}",
                f"{now:.6g}",
                _change(was, now),
                f"[{low:.4g}, {high:.4g}]{'' if inside else ' missed'}",
            ]
        )
    table("replay", ["", folder.name, again.name, "changed by", "bound"], rows)
    equal = all(row[3] == "0" for row in rows)
    verdict = (
        "equal to the bit"
        if equal
        else f"not equal; every score is {'within' if within else 'NOT within'} its interval"
    )
    expected = (
        "" if equal or not alike else ". With the same code, versions, base, data and machine equal bits were expected"
    )
    log("replay", f"{again} against {folder}: {verdict}{expected}")
    return Outcome(equal=equal, within=within, alike=alike)


def _scores(one: RunFolder, two: RunFolder) -> Iterator[tuple[str, float, float, float, float]]:
    """Yields name, value, low and high of each score with an interval, and the other run's value."""
    before, after = (
        named((run.manifest("eval") or {"product": {}})["product"].get("artifacts", {})) for run in (one, two)
    )
    for key, was in before.items():
        stem = key.removesuffix(".value")
        low, high = (f"{stem}.low", f"{stem}.high") if stem != key else (f"{key}_low", f"{key}_high")
        if low in before and high in before and key in after:
            yield stem, was, before[low], before[high], after[key]


def _adapters(folder: Path, again: Path) -> str:
    """Returns the largest difference between the weights of two adapters, ``0`` where all are equal."""
    import torch
    from safetensors.torch import load_file

    one, two = (load_file(run / "train" / "adapter" / "adapter_model.safetensors") for run in (folder, again))
    if one.keys() != two.keys() or any(one[name].shape != two[name].shape for name in one):
        return "other matrices"
    if all(torch.equal(one[name], two[name]) for name in one):
        return "0"
    return f"{max((one[name].double() - two[name].double()).abs().max().item() for name in one):.3g}"


def _change(was: float, now: float) -> str:
    return "0" if was == now else f"{now - was:+.3g}"


def _is(item: Difference, names: tuple[str, ...]) -> bool:
    return item.key.split(".")[0] in names


def _sentence(item: Difference) -> str:
    was, now = (value if isinstance(value, str | int | float) else "not recorded" for value in (item.one, item.two))
    return f"{item.key} was {was} and is {now}"


def _code(changed: list[Difference]) -> list[str]:
    """Returns what differs in the code. The packages' hashes decide; the commit helps to find them again."""
    if not any(_is(item, ("code",)) for item in changed):
        return []
    return [_sentence(item) for item in changed if _is(item, ("finetune", "commit", "code"))]


def _base(config: RunConfig, folder: Path) -> list[str]:
    from finetune.model import fetch

    was = (RunFolder(folder).manifest("model") or {"product": {}})["product"].get("sha256")
    now = fetch(config.model).sha256
    return [] if was == now else [f"the weights of {config.model.name} had hash {str(was)[:12]} and have {now[:12]}"]


def _data(folder: Path, again: Path) -> list[str]:
    was, now = (
        (RunFolder(run).manifest("data") or {"product": {}})["product"].get("fingerprint") for run in (folder, again)
    )
    return (
        []
        if was == now
        else [f"the prepared data had fingerprint {str(was)[:12]} and have {str(now)[:12]}: rows, template, tokenizer"]
    )


def _stop_if(differing: list[str], folder: Path, *, force: bool) -> None:
    if differing and not force:
        listed = "".join(f"\n  - {sentence}" for sentence in differing)
        raise FinetuneError(
            f"{folder} is not replayed, because what it was made with has changed:{listed}\nrestore it, or add --force"
        )
    for sentence in differing:
        log("replay", f"differs: {sentence}")
