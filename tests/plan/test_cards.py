"""The table of cards, the cards that experiments name, and that what the plan proposes passes the memory check."""

import re
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.cli.look import card_machines
from finetune.config import load
from finetune.paths import CONF
from finetune.plan.cards import cell
from finetune.plan.fit import search
from finetune.plan.product import make_plan, usable_bytes
from finetune.plan.settings import from_config
from finetune.preflight.memory_check import compare, planned_needs
from finetune.run import to_jsonable

DOCS = Path(__file__).parents[2] / "docs"
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
NAMED = {
    experiment: size
    for experiment in EXPERIMENTS
    if (size := re.search(r"of (\d+) GB", (CONF / "experiment" / f"{experiment}.yaml").read_text()))
}


def test_the_documented_table_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--cards"]) == 0
    assert capsys.readouterr().out in (DOCS / "plan.md").read_text()


def test_most_experiments_name_a_card() -> None:
    assert len(NAMED) >= 8


@pytest.mark.parametrize("experiment", NAMED)
def test_every_experiment_fits_the_card_that_its_header_names(experiment: str) -> None:
    config = load([f"+experiment={experiment}"])
    gpus = "2 x " if config.launch.processes == 2 else ""
    assert not cell(config, card_machines()[f"{gpus}{NAMED[experiment][1]} GB"]).startswith("no")


def test_settings_that_are_typed_are_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--cards", "+experiment=llama7b_qlora", "run.name=mine", "train.micro_batch=1"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 1
    assert rows[0].startswith("| `mine` |")
    assert "(1, full)" in rows[0]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_memory_check_accepts_what_is_proposed_or_chosen_on_any_card(experiment: str) -> None:
    config = load([f"+experiment={experiment}"])
    for name, here in card_machines().items():
        chosen = from_config(config, here)
        proposed = [candidate.inputs for candidate in search(chosen, here)[1][:1]]
        fits = [chosen] if make_plan(chosen, here, checkpoints=2).fits else []
        for settings in [*proposed, *fits]:
            made = make_plan(settings, here, checkpoints=2)
            usable = round(usable_bytes(settings, here))
            result = compare(planned_needs(to_jsonable(made), until="report"), memory=usable, disk=2**60)
            assert result.passed, f"{experiment} on {name}: {result.figure}"


def test_the_memory_check_refuses_what_training_cannot_do_and_tolerates_what_it_halves() -> None:
    config = load(["+experiment=llama7b_qlora", "train.micro_batch=4", "train.checkpointing=full"])
    made = make_plan(from_config(config, card_machines()["12 GB"]), card_machines()["12 GB"], checkpoints=2)
    needs = planned_needs(to_jsonable(made), until="report")
    between = compare(needs, memory=(made.least_bytes + made.needed_bytes) // 2, disk=2**60)
    assert between.passed
    assert "will halve its micro-batch" in between.figure
    assert not compare(needs, memory=made.least_bytes - 1, disk=2**60).passed
