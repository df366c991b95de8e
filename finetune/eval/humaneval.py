"""HumanEval by our own runner: completions from any writer, each run with its tests in the sandbox.

Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code; the problems are OpenAI's ``HumanEval.jsonl.gz``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.cache import file_sha256
from finetune.console import log, table
from finetune.errors import EvalError
from finetune.eval.completers import Sampling, Writer, open_writer
from finetune.eval.metrics import pass_at_k
from finetune.eval.records import whole_lines
from finetune.eval.sandbox import PASSED, run
from finetune.inference.bootstrap import Bootstrap, mean_of

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What ends a completion. Source: Chen et al. 2021, section 2.3."""

TOP_P = 0.95
"""Of drawn completions. Source: the same section."""

KS = (1, 10, 100)
"""Samples that pass@k speaks of. Source: the same paper."""

FIELDS = ("task_id", "prompt", "entry_point", "test")
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Problem:
    """One task: a function's head, its name, and the source of ``check``, which calls it.

    The head is given without its last line break: in most vocabularies a line break and the spaces after it are one token,
    and after a lone line break a model takes the function for finished. Source: bigcode-evaluation-harness, task humaneval.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    solution: str = ""

    def program(self, completion: str) -> str:
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


@dataclass(slots=True)
class Solutions:
    """The file's own solutions as a writer: what is wrong then is the runner's fault."""

    tasks: list[Problem]
    key: str = "solutions"

    def generate(self, prompt: str, *, seed: int) -> str:
        return next("\n" + task.solution for task in self.tasks if task.prompt == prompt)


def humaneval(
    source: Path,
    *,
    model: str,
    problems: int = 164,
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    seed: int = 1,
    quantization: str = "none",
    out: Path = Path("outputs/humaneval"),
) -> None:
    """Measures a model and says so; the last line printed is the result as JSON.

    Stopped and started again with the same settings, it goes on; more problems or samples are added to those that are there.

    Args:
        source: ``HumanEval.jsonl`` or ``.jsonl.gz``, or another file with the same fields.
        model: A ``.gguf`` file runs in llama.cpp; anything else that ``model.name`` can name in transformers; ``solutions`` are the
            file's own and try the runner.
        problems: From the top.
        samples: Completions of each problem.
        temperature: 0 writes greedily.
        max_new_tokens: Of a completion at most.
        seed: Of drawn completions and of the bootstrap.
        quantization: Option of the quantization group, for models in transformers.
        out: Folder of the completions; a file for each model and way to draw.

    Raises:
        EvalError: The source cannot be read, the settings contradict each other, or the model cannot be opened.
    """
    if samples > 1 and temperature == 0:
        raise EvalError(
            f"samples={samples} with temperature=0 writes the same completion again; set temperature, e.g. temperature=0.8"
        )
    tasks = read_problems(source)[:problems]
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=TOP_P, stops=STOPS)
    writer = Solutions(tasks) if model == "solutions" else open_writer(model, sampling, quantization=quantization)
    settings = [writer.key, file_sha256(source), max_new_tokens, temperature, TOP_P, STOPS, seed]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    file = out / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', Path(model).name)}-{key}.jsonl"
    lines = complete(tasks, writer, file, samples=samples, seed=seed)
    log("bench", f"completions and how they ended: {file}")
    _show(lines)
    sys.stdout.write(json.dumps(result(lines, seed=seed)) + "\n")
    sys.stdout.flush()


def greedy(max_new_tokens: int) -> Sampling:
    """One completion of each problem, the most probable token each time."""
    return Sampling(max_new_tokens=max_new_tokens, temperature=0.0, top_p=TOP_P, stops=STOPS)


def read_problems(source: Path) -> list[Problem]:
    """All problems of a file.

    Raises:
        EvalError: There is no such file, or a line is no problem.
    """
    if not source.is_file():
        raise EvalError(f"source: {source} does not exist; give HumanEval.jsonl or HumanEval.jsonl.gz")
    content = source.read_bytes()
    try:
        text = (gzip.decompress(content) if source.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise EvalError(f"source: {source} cannot be read: {error}; fetch it again") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            found.append(
                Problem(
                    row["task_id"],
                    row["prompt"].rstrip(),
                    row["entry_point"],
                    row["test"],
                    row.get("canonical_solution", ""),
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvalError(
                f"source: {source}, line {number} is no problem of HumanEval: each needs {', '.join(FIELDS)}"
            ) from error
    if not found:
        raise EvalError(f"source: {source} is empty; give HumanEval.jsonl or HumanEval.jsonl.gz")
    return found


def complete(tasks: list[Problem], writer: Writer, file: Path, *, samples: int, seed: int) -> list[dict[str, Any]]:
    """Writes and runs what is not in the file yet, one line at a time.

    Returns:
        ``{"task_id", "sample", "completion", "outcome", "reason"}``, of the tasks and samples that were asked for.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {(line["task_id"], line["sample"]): line for line in whole_lines(file)}
    wanted = [(task, sample) for task in tasks for sample in range(samples)]
    open_ones = [(task, sample) for task, sample in wanted if (task.task_id, sample) not in done]
    if len(open_ones) < len(wanted):
        log("bench", f"{len(wanted) - len(open_ones)} of {len(wanted)} completions were there already")
    unclosed: set[str] = set()
    with open(file, "a", encoding="utf-8") as handle:
        for task, sample in tqdm(open_ones, desc="HumanEval", unit="program", file=sys.stderr, leave=False):
            completion = writer.generate(task.prompt, seed=_seed(seed, task.task_id, sample))
            verdict = run(task.program(completion))
            line = {
                "task_id": task.task_id,
                "sample": sample,
                "completion": completion,
                "outcome": verdict.outcome,
                "reason": verdict.reason,
            }
            handle.write(json.dumps(line) + "\n")
            handle.flush()
            done[task.task_id, sample] = line
            unclosed |= set(verdict.unclosed)
    if unclosed:
        log("bench", f"this machine could not keep the programs from: {', '.join(sorted(unclosed))}")
    return [done[task.task_id, sample] for task, sample in wanted]


def result(lines: list[dict[str, Any]], *, seed: int) -> dict[str, Any]:
    """``pass_at_1`` with its 95 % interval over problems, pass@k for other k that there are samples for, and the counts."""
    passed: dict[str, list[bool]] = {}
    for line in lines:
        passed.setdefault(line["task_id"], []).append(line["outcome"] == PASSED)
    samples = min(len(outcomes) for outcomes in passed.values())
    found: dict[str, Any] = {}
    for k in KS:
        if k <= samples:
            estimates = [pass_at_k(len(outcomes), sum(outcomes), k) for outcomes in passed.values()]
            interval = Bootstrap(len(estimates), samples=RESAMPLES, seed=seed).level(mean_of(estimates))
            found |= {
                f"pass_at_{k}": interval.value,
                f"pass_at_{k}_low": interval.low,
                f"pass_at_{k}_high": interval.high,
            }
    return {**found, "problems": len(passed), "samples": samples}


def _seed(seed: int, task: str, sample: int) -> int:
    """The same for the same completion, whatever was written before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{task}:{sample}".encode()).digest()[:4], "little")


def _show(lines: list[dict[str, Any]]) -> None:
    """How the programs ended, by what they raised."""
    ends = Counter((line["outcome"], line["reason"].split(":")[0]) for line in lines)
    table("bench", ["outcome", "reason", "programs"], [[*end, str(count)] for end, count in ends.most_common()])
