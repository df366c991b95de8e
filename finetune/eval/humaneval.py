"""Runs HumanEval: completions from any completer, each run with its tests in the sandbox.

Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code; the problems are OpenAI's
``HumanEval.jsonl.gz``.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.cache import file_sha256
from finetune.console import ProgressBar, log, table
from finetune.errors import EvalError
from finetune.eval.completers import Completer, Sampling, load_completer
from finetune.eval.metrics import pass_at_k
from finetune.eval.records import complete_lines
from finetune.eval.sandbox import PASSED, check_sandbox, run_program
from finetune.inference.bootstrap import Bootstrap, mean_of

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Texts that end a completion. Source: Chen et al. 2021, section 2.3."""

TOP_P = 0.95
"""For sampled completions. Source: the same section."""

KS = (1, 10, 100)
"""Values of k in pass@k. Source: the same paper."""

JUDGE = "tests in a process of their own"
"""How programs are judged; completions that were judged in another way are not reused."""

FIELDS = ("task_id", "prompt", "entry_point", "test")
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Problem:
    """One task: a function's head, its name, and the source of ``check``, which calls it.

    The head has no final line break: in most vocabularies a line break and the spaces after it are one token, and
    after a lone line break a model takes the function for finished. Source: bigcode-evaluation-harness, task humaneval.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    solution: str = ""

    def tests(self) -> str:
        """Returns the source of the tests of the completed function."""
        return f"{self.test}\ncheck({self.entry_point})\n"


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion of one problem, and how its program ended."""

    task_id: str
    sample: int
    completion: str
    outcome: str
    reason: str

    @property
    def passed(self) -> bool:
        return self.outcome == PASSED


@dataclass(slots=True)
class ReferenceSolutions:
    """Completes with the file's own solutions, to test the runner."""

    problems: list[Problem]
    key: str = "solutions"

    def complete(self, prompt: str, *, seed: int) -> str:
        """Returns the solution of the problem with this prompt."""
        return next("\n" + problem.solution for problem in self.problems if problem.prompt == prompt)


def humaneval(
    source: Path,
    *,
    model: str,
    problems: int | None = None,
    samples: int = 1,
    sampling: Sampling | None = None,
    seed: int = 1,
    quantization: str = "none",
    out: Path = Path("outputs/humaneval"),
) -> None:
    """Measures a model and prints the result, as JSON in the last line.

    A stopped run continues when it is started with the same settings; more problems or samples are added to earlier
    ones.

    Args:
        source: ``HumanEval.jsonl`` or ``.jsonl.gz``, or another file with the same fields.
        model: A ``.gguf`` file runs in llama.cpp; any other value of ``model.name`` in transformers; ``solutions`` are
            the file's own, to test the runner.
        problems: Number of problems, from the top; None takes all.
        samples: Completions of each problem.
        sampling: How to sample tokens; None takes the most likely token, at most 512 times.
        seed: Of sampling and of the bootstrap.
        quantization: Option of the quantization group, for models in transformers.
        out: Folder of the completions; each model and sampling has its own file.

    Raises:
        EvalError: The source cannot be read, the settings contradict each other, the model cannot be opened, or this
            machine cannot restrict programs.
    """
    sampling = sampling or humaneval_sampling(512)
    if samples > 1 and sampling.temperature == 0:
        raise EvalError(
            f"samples={samples} with temperature=0 writes the same completion again; "
            "set temperature, e.g. temperature=0.8"
        )
    tasks = read_problems(source)[:problems]
    check_sandbox()
    own = model == "solutions"
    completer = ReferenceSolutions(tasks) if own else load_completer(model, sampling, quantization=quantization)
    settings = [JUDGE, completer.key, file_sha256(source), *dataclasses.astuple(sampling), seed]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    file = out / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', Path(model).name)}-{key}.jsonl"
    completions = run_problems(tasks, completer, file, samples=samples, seed=seed)
    log("bench", f"completions and how they ended: {file}")
    _print_outcomes(completions)
    sys.stdout.write(json.dumps(summarize(completions, seed=seed)) + "\n")
    sys.stdout.flush()


def humaneval_sampling(max_new_tokens: int, temperature: float = 0.0) -> Sampling:
    """Returns the paper's sampling; temperature 0 takes the most likely token."""
    return Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=TOP_P, stops=STOPS)


def read_problems(source: Path) -> list[Problem]:
    """Reads all problems of a file.

    Raises:
        EvalError: The file is missing, or a line is not a problem.
    """
    if not source.is_file():
        raise EvalError(f"source: {source} does not exist; give HumanEval.jsonl or HumanEval.jsonl.gz")
    content = source.read_bytes()
    try:
        text = (gzip.decompress(content) if source.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise EvalError(f"source: {source} cannot be read: {error}; download it again") from error
    problems = [_parse_problem(source, number, line) for number, line in enumerate(text.splitlines(), 1)]
    if not problems:
        raise EvalError(f"source: {source} is empty; give HumanEval.jsonl or HumanEval.jsonl.gz")
    return problems


def _parse_problem(source: Path, number: int, line: str) -> Problem:
    try:
        row = json.loads(line)
        task_id, prompt, entry_point, test = (row[field] for field in FIELDS)
        return Problem(task_id, prompt.rstrip(), entry_point, test, row.get("canonical_solution", ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvalError(
            f"source: {source}, line {number} is not a problem of HumanEval: each needs {', '.join(FIELDS)}"
        ) from error


def run_problems(
    problems: list[Problem], completer: Completer, file: Path, *, samples: int, seed: int
) -> list[Completion]:
    """Completes and runs what is not in the file yet, and returns all completions of these problems and samples.

    Args:
        problems: To complete.
        completer: Writes the completions.
        file: JSON Lines, one completion each; new ones are appended.
        samples: Completions of each problem.
        seed: Of sampling.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {(entry.task_id, entry.sample): entry for entry in (Completion(**line) for line in complete_lines(file))}
    wanted = [(problem, sample) for problem in problems for sample in range(samples)]
    missing = [(problem, sample) for problem, sample in wanted if (problem.task_id, sample) not in done]
    if len(missing) < len(wanted):
        log("bench", f"reusing {len(wanted) - len(missing)} of {len(wanted)} completions from {file}")
    with (
        open(file, "a", encoding="utf-8") as handle,
        ProgressBar("bench", total=len(missing), unit="programs") as bar,
    ):
        for problem, sample in missing:
            bar.advance()
            text = completer.complete(problem.prompt, seed=_seed(seed, problem.task_id, sample))
            verdict = run_program(f"{problem.prompt}{text}\n", tests=problem.tests())
            entry = Completion(problem.task_id, sample, text, verdict.outcome, verdict.reason)
            handle.write(json.dumps(dataclasses.asdict(entry)) + "\n")
            handle.flush()
            done[problem.task_id, sample] = entry
    return [done[problem.task_id, sample] for problem, sample in wanted]


def summarize(completions: list[Completion], *, seed: int) -> dict[str, Any]:
    """Returns ``pass_at_1`` and other pass@k with their 95 % intervals over problems, and the counts."""
    passed: dict[str, list[bool]] = {}
    for entry in completions:
        passed.setdefault(entry.task_id, []).append(entry.passed)
    samples = min(len(outcomes) for outcomes in passed.values())
    figures: dict[str, Any] = {}
    for k in KS:
        if k <= samples:
            estimates = [pass_at_k(len(outcomes), sum(outcomes), k) for outcomes in passed.values()]
            interval = Bootstrap(len(estimates), samples=RESAMPLES, seed=seed).level(mean_of(estimates))
            values = {"": interval.value, "_low": interval.low, "_high": interval.high}
            figures |= {f"pass_at_{k}{suffix}": value for suffix, value in values.items()}
    return {**figures, "problems": len(passed), "samples": samples}


def _seed(seed: int, task: str, sample: int) -> int:
    """Returns the same seed for the same completion, whatever was written before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{task}:{sample}".encode()).digest()[:4], "little")


def _print_outcomes(completions: list[Completion]) -> None:
    """Prints how the programs ended, by what they raised."""
    counts = Counter((entry.outcome, entry.reason.split(":")[0]) for entry in completions)
    rows = [[outcome, reason, str(count)] for (outcome, reason), count in counts.most_common()]
    table("bench", ["outcome", "reason", "programs"], rows)
