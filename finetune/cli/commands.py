"""Every command of the program, in one table."""

from __future__ import annotations

from finetune.cli import look, proof, run
from finetune.cli.bench import BENCHMARKS, choose_benchmark
from finetune.cli.command import Command, Option
from finetune.cli.config import CONFIG
from finetune.cli.convert import CONVERT
from finetune.cli.env import ENV
from finetune.cli.init import INIT
from finetune.cli.serve import CHAT, SERVE
from finetune.cli.verify import VERIFY

EXISTING = ("run.name", "run.root")
"""The settings of commands that only read a run folder."""

QUIET = Option("quiet", "print only the end: the scores, the report, and how to use the result", short="q")

COMMANDS = (
    INIT,
    CONVERT,
    Command(
        "run", "every stage, from plan to report; the command where none is named", run.run_stages, distributed=True,
        options=(QUIET,), example="finetune run +experiment=llama7b_qlora lora.rank=8",
    ),
    Command(
        "plan", "memory, time and disk of every stage; no weights are touched", run.show_plan,
        options=(
            Option("fit", "also propose the settings that fit this machine and train fastest"),
            Option("exact", "also count one step of the real modelling code, tensor by tensor; half a minute"),
            Option("verbose", "also print the bytes of each phase by term", short="v"),
            Option("json", "print one JSON document instead"),
            Option("cards", "a table of cards: which of them run the whole line, and how", run=look.plan_cards),
            Option("explain", "who set a setting, and what it would be otherwise", "KEY", run=look.explain_setting),
        ),
        example="finetune plan +experiment=llama7b_qlora --fit",
    ),
    Command(
        "data", "prepare the data and show what is trained on", run.run_stages, preview=True,
        options=(
            QUIET,
            Option("why", "what became of one row", "FILE:LINE", run=look.explain_row),
            Option("prove-template", "compare what is trained at each turn with what serving sends and expects there",
                   run=proof.prove_template),
            Option("prove-turns", "the same, with the text of every turn", run=proof.prove_turns),
        ),
        example="finetune data model.name=org/model data.path=rows.jsonl --why rows.jsonl:137",
    ),
    Command(
        "preflight", "the checks before training, on the real model and batches", run.run_stages, preview=True,
        options=(QUIET,), example="finetune preflight +experiment=quickstart",
    ),
    Command(
        "train", "train again in a run that exists, and all that follows", run.run_stages, distributed=True,
        redo_from="train", options=(QUIET,), example="finetune train run.name=first optim.learning_rate=1e-4",
    ),
    Command(
        "merge", "merge again in a run that exists, and all that follows", run.run_stages, redo_from="merge",
        options=(QUIET,), example="finetune merge run.name=first merge.choose=fidelity",
    ),
    Command(
        "eval", "evaluate again in a run that exists, and all that follows", run.run_stages, redo_from="eval",
        options=(
            QUIET,
            Option("compare", "compare with another run, on the rows that both were evaluated on", "RUN",
                   run=look.compare_scores, settings=(*EXISTING, "run.seed", "experiment")),
        ),
        example="finetune eval run.name=first --compare second",
    ),
    Command(
        "export", "export again in a run that exists, and all that follows", run.run_stages, redo_from="export",
        options=(QUIET,), example="finetune export run.name=first export=[gguf_q8_0]",
    ),
    Command(
        "report", "write the report of a run, or of a sweep, from its folder", look.write_report,
        options=(
            Option("sweep", "the table of a sweep", "NAME", run=look.write_sweep_report, settings=("run.root",)),
        ),
        example="finetune report run.name=first",
    ),
    Command(
        "replay", "a finished run again, to see whether it comes out the same", run.replay, settings=EXISTING,
        options=(Option("force", "continue where code, versions, base or data differ"),),
        example="finetune replay run.name=first",
    ),
    Command(
        "diff", "what two runs differ in", look.diff, arguments=("RUN", "RUN"), settings=("run.root",),
        options=(Option("json", "print JSON instead of tables"),),
        example="finetune diff first second --json",
    ),
    CONFIG,
    CHAT,
    SERVE,
    VERIFY,
    ENV,
    Command(
        "bench", "measurements that can be repeated", choose_benchmark, arguments=("WHAT",), settings=(),
        subcommands=BENCHMARKS, example="finetune bench speed ROWS.jsonl --against trl",
    ),
)  # fmt: skip
