"""Runs the checks against a server."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from finetune.console import log
from finetune.errors import ConfigError
from finetune.verify.checks import (
    DIFFERS,
    PASS,
    Answered,
    Check,
    ask,
    check_answers,
    check_context,
    check_end,
    check_repeat,
    check_template,
)
from finetune.verify.endpoint import Endpoint, Refused
from finetune.verify.figures import check_loss, check_metrics
from finetune.verify.reference import Reference, read_config, read_reference

ROWS = 32
"""Held-out rows by default: a choice, for a minute on a small model."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server that is verified.

    Attributes:
        url: With or without ``/v1``.
        model: Its name there; empty for the only one, or the one that is called as the run.
        key: Empty for none.
        seconds: Longest wait for one answer.
    """

    url: str
    model: str = ""
    key: str = ""
    seconds: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What may differ.

    Attributes:
        loss: Of held-out rows, in nats per token, averaged over rows without its sign. Rounding to bfloat16 gives a
            few thousandths, 4-bit weights instead of 16-bit ones a few hundredths.
        agreement: How much of the answers must agree, before the first difference of each.
    """

    loss: float = 0.02
    agreement: float = 0.8


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The result.

    Attributes:
        run: Its folder.
        url: Of the server.
        model: Its name there.
        artifact: Of the run, which it is compared with.
        passed: Whether nothing differs, and something passed.
        checks: In the order in which they ran.
    """

    run: str
    url: str
    model: str
    artifact: str
    passed: bool
    checks: list[Check]


def verify(
    run: Path, target: Target, *, artifact: str = "", rows: int = ROWS, bounds: Bounds | None = None
) -> Verified:
    """Compares what a server gives with what the run measured.

    Args:
        run: The run's folder.
        target: The server.
        artifact: ``adapter``, ``merged``, ``base``, ``base_quantized`` or an export; empty takes what the model's name
            says, and otherwise the adapter.
        rows: Held-out rows, at most.
        bounds: What may differ.

    Raises:
        ConfigError: The run or artifact is missing, nothing listens, or the server is another kind or lacks the model.
    """
    bounds = bounds or Bounds()
    read_config(run)  # before the server is asked
    endpoint = Endpoint(target.url, target.model, key=target.key, seconds=target.seconds)
    endpoint.model = _choose(endpoint.models(), target.model, run.name)
    reference = read_reference(run, artifact=artifact, model=endpoint.model, rows=rows)
    log("verify", f"{endpoint.model} at {endpoint.root} compared with {reference.artifact} of {run}")
    answered, failed = _answer(endpoint, reference)
    checks = [
        check_template(endpoint, reference, answered),
        check_context(endpoint, reference),
        *failed,
        check_answers(answered, bound=bounds.agreement),
        check_end(answered),
        check_repeat(endpoint, answered, max_tokens=reference.max_new_tokens),
        check_loss(endpoint, reference, bound=bounds.loss),
        *check_metrics(answered, reference),
    ]
    verdicts = {check.verdict for check in checks}
    return Verified(
        run=str(run),
        url=endpoint.root,
        model=endpoint.model,
        artifact=reference.artifact,
        passed=DIFFERS not in verdicts and PASS in verdicts,
        checks=checks,
    )


def show(verified: Verified) -> None:
    """Prints one line for each check, and the verdict."""
    for check in verified.checks:
        style = "bold red" if check.verdict == DIFFERS else ""
        log("verify", f"{check.verdict:<15}  {check.name}: {check.detail}", style=style)
    count = sum(check.verdict == DIFFERS for check in verified.checks)
    if verified.passed:
        log("verify", f"{verified.model} is what was trained, as far as it can be asked", style="bold green")
    elif count:
        log("verify", f"{verified.model} is not what was trained: {count} of {len(verified.checks)} checks differ")
    else:
        log("verify", "nothing could be checked")


def _choose(names: list[str], wanted: str, run: str) -> str:
    """Returns the model to ask: the wanted one, the one called as the run, or the only one.

    Raises:
        ConfigError: There is no such model.
    """
    exact = next((name for name in (wanted, f"{wanted}:latest") if name in names), None)  # Ollama adds a tag
    if exact:
        return exact
    if not wanted and (run in names or len(names) == 1):
        return run if run in names else names[0]
    near = difflib.get_close_matches(wanted, names, n=1) if wanted else []
    hint = f"; did you mean model={near[0]}?" if near else ""
    raise ConfigError(f"model={wanted or '?'}: the server has {', '.join(names) or 'none'}{hint}")


def _answer(endpoint: Endpoint, reference: Reference) -> tuple[list[Answered], list[Check]]:
    """Returns the answered rows, and a check that differs where rows were refused."""
    answered, refused = [], []
    for number, wanted in enumerate(reference.rows):
        try:
            reply = ask(endpoint, wanted, max_tokens=reference.max_new_tokens)
        except Refused as error:
            refused.append(error)
            if not error.status:
                break
            continue
        answered.append(Answered(wanted=wanted, reply=reply, number=number))
    if not refused:
        return answered, []
    detail = f"{len(refused)} of {len(reference.rows)} held-out rows are refused: {refused[0]}"
    return answered, [Check(name="held-out rows", verdict=DIFFERS, detail=detail)]
