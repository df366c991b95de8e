"""`finetune bench conformance`: computes step 0 of a run in two forms, and shows where they part.

The reference computes plainly, in float32 on the CPU; the other form is how the run would compute on this machine. Each
form quantizes the base itself, in a process and a cache of its own.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import log, table
from finetune.errors import TrainError

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
"""Share by which gradients may differ, by the coarser of the two dtypes. bfloat16 rounds by 2^-8, some hundred
operations deep: 2 to 5 % were seen on models of 2 to 30 layers. Float32 rounds by 2^-24, in another order of sums."""

LOSS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
"""Share by which losses may differ: they are means over tokens."""

SAME_SIGN = {"float32": 0.99, "bfloat16": 0.9, "float16": 0.9}
"""Share of the adapter's elements that the first step has to move the same way. Adam moves each by the learning rate,
whatever the size of its gradient, so those within rounding of 0 may go either way. Unrelated gradients give a half."""

KL = {"float32": 1e-6, "bfloat16": 3e-2, "float16": 3e-2}
"""Nats per token between the two next-token distributions after the step. 0.012 was seen on the 135M in
bfloat16."""

STORED_ROUNDING = 2**-8
"""Share by which merged weights may differ: how bfloat16, in which they are stored, rounds."""

LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the table.

    Attributes:
        what: What was compared.
        passed: Whether the difference is within the bound.
        figure: The difference.
        bound: What is allowed.
        worst: Where the difference is largest; empty where there is one place.
    """

    what: str
    passed: bool
    figure: str
    bound: str
    worst: str = ""


@dataclass(frozen=True, kw_only=True)
class Form:
    """Step 0 of a run as one form computes it; see `finetune.bench.conformance_worker.measure`."""

    loss: float
    codes: Mapping[str, str]
    dtype: str
    form: Sequence[str]
    tensors: Mapping[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Returns the tensors of one kind by their names in the model."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def compare_forms(overrides: Sequence[str], *, reference: Sequence[str]) -> bool:
    """Computes both forms, prints a table and one line of JSON; returns whether all is within its bound.

    Args:
        overrides: The run's settings.
        reference: Settings that make the reference of them.

    Raises:
        ConfigError: The settings do not fit together.
        TrainError: A form could not be computed; the message has the end of its output.
    """
    for settings in ([*overrides, *reference], overrides):
        _check(settings)  # both are refused before either is computed
    with tempfile.TemporaryDirectory(prefix="finetune-conformance-") as scratch:
        work = Path(scratch)
        expected = _measure([*overrides, *reference], work, name="reference")
        actual = _measure(overrides, work, name="run")
        comparisons = compare(actual, expected)
    log("bench", f"reference: {'; '.join(expected.form)}", f"run: {'; '.join(actual.form)}")
    cells = [(row.what, "PASS" if row.passed else "FAIL", row.figure, row.bound, row.worst) for row in comparisons]
    table("bench", ("step 0", "", "difference", "bound", "largest at"), cells)
    passed = all(row.passed for row in comparisons)
    log("bench", json.dumps({"passed": passed, "comparisons": [asdict(row) for row in comparisons]}))
    return passed


def _check(overrides: Sequence[str]) -> None:
    from finetune import hardware
    from finetune.checks import Start, check_before_start
    from finetune.config import load

    config = load(overrides)
    machine = hardware.probe(config.hardware)
    placement = hardware.place(machine, config)
    check_before_start(Start(config=config, machine=machine, placement=placement, finished=frozenset()))


def _measure(overrides: Sequence[str], work: Path, *, name: str) -> Form:
    from safetensors.torch import load_file

    from finetune.inference.fresh_process import FreshProcessError, run_in_fresh_process

    folder, tensors = work / "run", work / f"{name}.safetensors"
    folder.mkdir(exist_ok=True)
    request: dict[str, Any] = {"overrides": list(overrides), "folder": folder, "tensors": tensors}
    cache = {"FINETUNE_CACHE": str(work / f"cache-{name}")}
    try:
        found = run_in_fresh_process("finetune.bench.conformance_worker", request, work=work, environment=cache)
    except FreshProcessError as error:
        raise TrainError(f"bench conformance: the {name}'s form could not be computed: {error}") from error
    return Form(**found, tensors=load_file(tensors))


def compare(actual: Form, expected: Form) -> list[Comparison]:
    """Compares two forms of the same step."""
    dtype = max((actual.dtype, expected.dtype), key=ROUNDING.__getitem__)
    return [
        _codes(actual, expected),
        _loss(actual, expected, bound=LOSS[dtype]),
        _gradients(actual.part("gradient."), expected.part("gradient."), bound=ROUNDING[dtype]),
        _step(actual.part("step."), expected.part("step."), bound=SAME_SIGN[dtype]),
        _logits(actual.tensors["logits"], expected.tensors["logits"], bound=KL[dtype]),
        _merged(actual.part("merged."), expected.part("merged.")),
    ]


def _codes(actual: Form, expected: Form) -> Comparison:
    names = actual.codes.keys() | expected.codes.keys()
    other = sorted(name for name in names if actual.codes.get(name) != expected.codes.get(name))
    return Comparison(
        what="codes of the quantized base",
        passed=not other,
        figure=f"{len(names) - len(other)} of {len(names)} layers equal",
        bound="all",
        worst=other[0] if other else "",
    )


def _loss(actual: Form, expected: Form, *, bound: float) -> Comparison:
    difference = abs(actual.loss / expected.loss - 1) if expected.loss else math.inf
    return Comparison(
        what="loss",
        passed=difference <= bound,
        figure=f"{difference:.2g} ({actual.loss:.6f} and {expected.loss:.6f} nats)",
        bound=f"{bound:g}",
    )


def _gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], *, bound: float) -> Comparison:
    from finetune.preflight.gradient_checks import relative_difference

    layers, whole = _by_layer(actual), relative_difference(actual, expected)
    by_layer = {layer: relative_difference(layers.get(layer, {}), part) for layer, part in _by_layer(expected).items()}
    worst = max(by_layer, key=by_layer.__getitem__)
    return Comparison(
        what="gradients of the adapter",
        passed=whole <= bound,
        figure=f"{whole:.2g} of their norm",
        bound=f"{bound:g}",
        worst=f"layer {worst}: {by_layer[worst]:.2g}",
    )


def _step(actual: dict[str, Tensor], expected: dict[str, Tensor], *, bound: float) -> Comparison:
    import torch

    one, two = (torch.cat([part[name].flatten() for name in sorted(expected)]) for part in (actual, expected))
    moved = (one != 0) | (two != 0)
    share = float((one.sign() == two.sign())[moved].float().mean()) if moved.any() else 0.0
    return Comparison(
        what="one optimizer step",
        passed=share >= bound,
        figure=f"{share:.2%} of {int(moved.sum()):,} elements move the same way",
        bound=f"{bound:.0%}",
    )


def _logits(actual: Tensor, expected: Tensor, *, bound: float) -> Comparison:
    from torch.nn.functional import kl_div

    one, two = actual.log_softmax(-1), expected.log_softmax(-1)
    kl = float(kl_div(one, two, reduction="none", log_target=True).sum(-1).mean())
    return Comparison(
        what="predictions after the step", passed=kl <= bound, figure=f"KL {kl:.2g} nats", bound=f"{bound:g}"
    )


def _merged(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> Comparison:
    from finetune.preflight.gradient_checks import relative_difference

    found = {name: relative_difference({name: actual[name]}, {name: expected[name]}) for name in expected}
    worst = max(found, key=found.__getitem__, default="")
    largest = found.get(worst, 0.0)
    return Comparison(
        what="merged weights",
        passed=largest <= STORED_ROUNDING,
        figure=f"{largest:.2g} of their norm",
        bound=f"{STORED_ROUNDING:.2g}",
        worst=worst,
    )


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns tensors by the number of their decoder layer; those outside of the layers under ``none``."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = LAYER.search(name)
        found.setdefault(match[1] if match else "none", {})[name] = tensor
    return found
