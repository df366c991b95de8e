"""The commands of ``finetune bench``: each prints a table and ends with one line of JSON."""

from __future__ import annotations

import shlex
from pathlib import Path

from finetune.cli.command import Command, Invocation, Option, count, names, one_of, positive_number, whole_number
from finetune.cli.serve import RUN, find_target
from finetune.errors import EXIT_FAILURE, EXIT_OK, ConfigError

QUICKSTART = "smollm2_135m"
"""The quickstart's option of the model group."""


def choose_benchmark(invocation: Invocation) -> int:
    """Refuses a measurement that there is not; those that there are have commands of their own.

    Raises:
        ConfigError: With all that can be measured.
    """
    measurements = ", ".join(command.name.removeprefix("bench ") for command in BENCHMARKS)
    raise ConfigError(f"bench: name what to measure, one of {measurements}; got {' '.join(invocation.arguments)}")


def _data(invocation: Invocation) -> int:
    from finetune.bench.data import compare_data_preparation

    options = invocation.options
    tokenizer = options["tokenizer"] or quickstart_tokenizer()
    compare_data_preparation(Path(invocation.arguments[0]), tokenizer=tokenizer, rows=options["rows"])
    return EXIT_OK


def _speed(invocation: Invocation) -> int:
    from finetune.bench.speed import compare_training_speed

    options = invocation.options
    rows = Path(invocation.arguments[0])
    compare_training_speed(rows, rows=options["rows"], against=options["against"], repeats=options["repeats"])
    return EXIT_OK


def _start(invocation: Invocation) -> int:
    from finetune.bench.start import measure_start

    measure_start(repeats=invocation.options["repeats"])
    return EXIT_OK


def _conformance(invocation: Invocation) -> int:
    from finetune.bench.conformance import compare_forms

    passed = compare_forms(invocation.overrides, reference=shlex.split(invocation.options["reference"]))
    return EXIT_OK if passed else EXIT_FAILURE


def _serve(invocation: Invocation) -> int:
    from finetune.bench.serve import compare_servers

    options = invocation.options
    compare_servers(
        find_target(invocation),
        clients=options["clients"],
        seconds=options["seconds"],
        max_tokens=options["max_tokens"],
    )
    return EXIT_OK


def _quantization(invocation: Invocation) -> int:
    from finetune.bench.quantization import OptionalMeasurements, compare_methods
    from finetune.paths import SHIPPED

    options = invocation.options
    if options["task"] and not options["metric"]:
        raise ConfigError("bench quantization --task needs --metric, which judges its answers, e.g. --metric label")
    compare_methods(
        model=options["model"] or QUICKSTART,
        text=options["text"] or SHIPPED / "general.txt",
        tokens=options["tokens"],
        grid=_grid(invocation),
        out=options["out"],
        methods=options["methods"],
        optional=OptionalMeasurements(
            repeats=options["repeats"],
            task=options["task"],
            metric=options["metric"],
            rows=options["rows"],
            max_new_tokens=options["max_new_tokens"],
            humaneval=options["humaneval"],
            problems=options["problems"],
            samples=options["samples"],
        ),
    )
    return EXIT_OK


def _tuning(invocation: Invocation) -> int:
    from finetune.bench.tuning import TuningBudget, compare_tuning

    options = invocation.options
    compare_tuning(
        source=options["source"],
        rows=options["rows"],
        heldout=options["heldout"],
        model=options["model"] or QUICKSTART,
        grid=_grid(invocation),
        backends=options["backends"],
        budget=TuningBudget(
            steps=options["steps"],
            learning_rate=options["learning_rate"],
            seeds=options["seeds"],
            metric=options["metric"] or ("" if options["source"] else "json_fields"),
            max_new_tokens=options["max_new_tokens"],
        ),
        out=options["out"],
    )
    return EXIT_OK


def _humaneval(invocation: Invocation) -> int:
    from finetune.eval.humaneval import humaneval, humaneval_sampling

    options = invocation.options
    humaneval(
        Path(invocation.arguments[0]),
        model=invocation.arguments[1],
        problems=options["problems"],
        samples=options["samples"],
        sampling=humaneval_sampling(options["max_new_tokens"], options["temperature"]),
        seed=options["seed"],
        quantization=options["quantization"],
        out=options["out"],
    )
    return EXIT_OK


def quickstart_tokenizer() -> str:
    """Returns the folder of the quickstart's model, which brings a tokenizer with a chat template."""
    from finetune.config import load
    from finetune.model import fetch

    return str(fetch(load(["+experiment=quickstart"]).model).folder)


def _grid(invocation: Invocation) -> str:
    """The quickstart's model comes from a 4-bit file, so it alone is moved off that file's grid by default."""
    return str(invocation.options["grid"] or ("as_it_is" if invocation.options["model"] else "moved"))


def temperature(text: str) -> float:
    """Reads a finite number of 0 or more."""
    return 0.0 if text == "0" else positive_number(text)


MODEL = Option("model", "a folder, a hub id or an option of the model group", "NAME")
GRID = Option("grid", "move weights of a 4-bit file off its grid", "moved|as_it_is", one_of("moved", "as_it_is"))
BACKENDS = Option("backends", "which quantizations, between commas", "A,B", names, [])
METRIC = Option("metric", "the metric that judges answers", "NAME", default="")

BENCHMARKS = (
    Command(
        "bench data", "preparing rows, compared with TRL and the bare tokenizer", _data,
        arguments=("ROWS.jsonl",), settings=(),
        options=(
            Option("tokenizer", "folder or hub id of a tokenizer with a chat template", "NAME"),
            Option("rows", "rows to prepare", "N", whole_number, 100_000),
        ),
        example="finetune bench data gsm8k/train.jsonl",
    ),
    Command(
        "bench speed", "training, one option at a time, or compared with `trl sft`", _speed,
        arguments=("ROWS.jsonl",), settings=(),
        options=(
            Option("against", "compare with TRL instead of one option at a time", "trl", one_of("trl")),
            Option("rows", "rows to train on", "N", whole_number, 128),
            Option("repeats", "times that each is measured; the fastest counts", "N", whole_number, 1),
        ),
        example="finetune bench speed gsm8k/train.jsonl --against trl",
    ),
    Command(
        "bench start", "time from the start of a process to its first step", _start, settings=(),
        options=(Option("repeats", "prepared starts; the fastest counts", "N", whole_number, 3),),
        example="finetune bench start",
    ),
    Command(
        "bench conformance", "step 0 of a run as it computes here, next to plain float32 on the CPU", _conformance,
        options=(
            Option(
                "reference", "settings of the other side, between spaces", "SETTINGS",
                default="hardware.device=cpu model.dtype=float32 kernels=plain",
            ),
        ),
        example="finetune bench conformance +experiment=mine",
    ),
    Command(
        "bench serve", "a run's models under load, next to other servers", _serve, arguments=("[FOLDER|GGUF]",),
        settings=RUN,
        options=(
            Option("clients", "clients at the same time", "N", whole_number, 50),
            Option("seconds", "time under load for each server", "N", whole_number, 120),
            Option("max-tokens", "length of an answer at most", "N", whole_number, 32),
        ),
        example="finetune bench serve run.name=first",
    ),
    Command(
        "bench quantization", "every way to store a model: error, size, loss, speed", _quantization, settings=(),
        options=(
            MODEL,
            Option("text", "a text file for the loss", "FILE", Path),
            Option("tokens", "tokens of it", "N", whole_number, 2048),
            GRID,
            Option("out", "the page that is written", "FILE", Path, Path("outputs/quantization.html")),
            Option("methods", "which methods, between commas", "A,B", names, []),
            Option("repeats", "times that speed is measured; 0 leaves speeds out", "N", count, 3),
            Option("task", "JSON Lines whose answers are judged by --metric", "FILE", Path),
            METRIC,
            Option("rows", "rows of the task", "N", whole_number, 32),
            Option("max-new-tokens", "length of an answer at most", "N", whole_number, 256),
            Option("humaneval", "HumanEval.jsonl.gz, to have programs written and run", "FILE", Path),
            Option("problems", "problems of it, from the top", "N", whole_number, 164),
            Option("samples", "sampled programs of each, for pass@10; 0 samples none", "N", count, 0),
        ),
        example="finetune bench quantization --model my/model --text my.txt --repeats 0",
    ),
    Command(
        "bench tuning", "one task tuned on every kind of base, over seeds", _tuning, settings=(),
        options=(
            Option("source", "JSON Lines of the task; by default the quickstart's", "FILE", Path),
            Option("rows", "rows to train on", "N", whole_number, 64),
            Option("heldout", "rows to evaluate on", "N", whole_number, 64),
            MODEL,
            GRID,
            BACKENDS,
            Option("steps", "optimizer steps", "N", whole_number, 24),
            Option("learning-rate", "of every training", "RATE", positive_number, 1e-3),
            Option("seeds", "trainings of each base", "N", whole_number, 3),
            METRIC,
            Option("max-new-tokens", "length of an answer at most", "N", whole_number, 48),
            Option("out", "the file that is written", "FILE", Path, Path("outputs/tuning.json")),
        ),
        example="finetune bench tuning --source rows.jsonl --metric label",
    ),
    Command(
        "bench humaneval", "problems solved by a model or a GGUF file, in a sandbox", _humaneval,
        arguments=("HumanEval.jsonl.gz", "MODEL"), settings=(),
        options=(
            Option("problems", "problems, from the top", "N", whole_number, 164),
            Option("samples", "completions of each problem", "N", whole_number, 1),
            Option("temperature", "0 takes the most probable token", "T", temperature, 0.0),
            Option("max-new-tokens", "length of a completion at most", "N", whole_number, 512),
            Option("seed", "of sampled completions and of the bootstrap", "N", whole_number, 1),
            Option("quantization", "option of the quantization group", "NAME", default="none"),
            Option("out", "folder for completions and results", "FOLDER", Path, Path("outputs/humaneval")),
        ),
        example="finetune bench humaneval HumanEval.jsonl.gz smollm2_135m --problems 20",
    ),
)  # fmt: skip
