"""lm-eval's tasks on models in memory, from local files: the same figures as counted by hand, and clear refusals."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import EvalError
from finetune.eval.harness import Harness, HarnessConfig, show_harness
from finetune.inference.adapted import load_adapted_model
from tests.fixtures.artifacts import Line, make_adapter
from tests.fixtures.tasks import CHOICES, ROWS, write_task

GROUP = """
group: both
task: [one, other]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1.0}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval")
    write_task(tmp_path, "one")
    return tmp_path


@pytest.fixture(scope="module")
def base(loud_base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(loud_base, dtype=torch.float32).eval()


def harness(folder: Path, *names: str, **settings: Any) -> Harness:
    return Harness(HarnessConfig(tasks=list(names), include_path=str(folder), **settings), samples=50, seed=1)


def right_by_hand(model: Any, tokenizer: Any, row: dict[str, str]) -> bool:
    """Whether the right choice is the likeliest continuation, summed over its tokens."""

    def likelihood(choice: str) -> float:
        context = tokenizer.encode(row["question"])
        whole = torch.tensor([[*context, *tokenizer.encode(f" {choice}")]])
        with torch.no_grad():
            chances = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])
        return float(chances[len(context) - 1 :].sum())

    return max(CHOICES, key=likelihood) == row["answer"]


def test_accuracy_is_what_a_count_by_hand_gives(tasks: Path, base: Any, tokenizer: Any) -> None:
    found = harness(tasks, "one", batch_rows=4).measure(base, tokenizer)
    right = [right_by_hand(base, tokenizer, row) for row in ROWS]
    share = sum(right) / len(right)
    assert 0 < share < 1
    accuracy = found.tasks["one"].metrics["acc"]
    assert accuracy.value == pytest.approx(share)
    assert accuracy.stderr == pytest.approx((share * (1 - share) / (len(right) - 1)) ** 0.5)
    assert (found.tasks["one"].rows, found.tasks["one"].shots, found.tasks["one"].version) == (
        20,
        0,
        3.0,
    )
    assert found.lm_eval == "0.4.13"


def test_limit_takes_the_first_rows(tasks: Path, base: Any, tokenizer: Any) -> None:
    found = harness(tasks, "one", limit=7).measure(base, tokenizer).tasks["one"]
    assert found.rows == 7
    assert found.metrics["acc"].value == pytest.approx(sum(right_by_hand(base, tokenizer, row) for row in ROWS[:7]) / 7)


def test_solved_examples_are_the_same_for_a_seed(tasks: Path, base: Any, tokenizer: Any) -> None:
    several = harness(tasks, "one", shots=3)
    first = several.measure(base, tokenizer)
    assert first.tasks["one"].shots == 3
    assert several.measure(base, tokenizer) == first
    assert harness(tasks, "one", shots=3).measure(base, tokenizer) == first


@pytest.mark.slow
def test_group_of_own_tasks_is_measured_with_its_parts(tasks: Path, base: Any, tokenizer: Any, capsys: Any) -> None:
    write_task(tasks, "other", more="num_fewshot: 1")
    (tasks / "both.yaml").write_text(GROUP)
    found = harness(tasks, "both", batch_rows=8).measure(base, tokenizer)
    assert set(found.tasks) == {"both", "one", "other"}
    values = {name: task.metrics["acc"].value for name, task in found.tasks.items()}
    assert values["both"] == pytest.approx((values["one"] + values["other"]) / 2)
    show_harness({"base": found, "merged": found})
    assert "both acc" in capsys.readouterr().out


@pytest.mark.parametrize("trained", [[], ["lm_head"], ["embed_tokens"]], ids=str)
def test_trained_graph_is_left_as_it_is(
    tasks: Path, line: Callable[..., Line], loud_base: Path, tokenizer: Any, tmp_path: Path, trained: list[str]
) -> None:
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(loud_base, tmp_path / "made", modules_to_save=trained or None).folder / "adapter"
    saved = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: tensor.bfloat16().clone() for name, tensor in saved.items()}, adapter / "adapter_model.safetensors"
    )
    parts = line()
    graph = load_adapted_model(parts.spec, adapter)
    prompt = torch.tensor([[1, 40, 50, 60]])
    with torch.no_grad():
        before = graph(prompt).logits
        found = harness(tasks, "one", batch_rows=4).measure(graph, tokenizer)
        assert torch.equal(graph(prompt).logits, before)
    assert found.tasks["one"].metrics["acc"].value == pytest.approx(
        sum(right_by_hand(graph, tokenizer, row) for row in ROWS) / len(ROWS), abs=0.101
    )  # bfloat16 in batches rounds otherwise: two rows of twenty may change


def test_task_that_needs_the_hub_is_refused_offline(tasks: Path) -> None:
    (tasks / "far.yaml").write_text(
        (tasks / "one.yaml").read_text().replace("task: one", "task: far").replace("json\n", "org/data\n")
    )
    with pytest.raises(EvalError, match=r"Couldn't reach 'org/data' on the Hub.*HF_HUB_OFFLINE is set.*include_path"):
        harness(tasks, "far")


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ("{not json\n", "", "cannot be loaded: "),
        ("", "", "a data file of a task is empty"),
        (None, "doc_to_text: '{{question'", "cannot be loaded: TemplateSyntaxError"),
    ],
)
def test_task_that_cannot_be_loaded_is_said(tasks: Path, rows: str | None, more: str, message: str) -> None:
    write_task(tasks, "broken", rows=rows, more=more)
    with pytest.raises(EvalError, match=rf"eval\.harness\.tasks=broken.* {message}"):
        harness(tasks, "broken")


def test_missing_data_file_is_said(tasks: Path) -> None:
    (tasks / "one.jsonl").unlink()
    with pytest.raises(EvalError, match=r"eval\.harness\.tasks=one cannot be loaded: FileNotFoundError"):
        harness(tasks, "one")


def test_task_that_runs_code_is_refused(tasks: Path) -> None:
    write_task(tasks, "code", more="unsafe_code: true")
    with pytest.raises(EvalError, match="code runs code that a model wrote"):
        harness(tasks, "code")


@pytest.mark.slow
def test_unknown_task_is_refused_after_the_packaged_ones_were_seen(tasks: Path) -> None:
    with pytest.raises(EvalError, match=r"nonsense unknown; name what .* and `lm-eval ls tasks` list"):
        harness(tasks, "one", "nonsense")


def test_missing_package_is_said_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert list(HarnessConfig(tasks=["mmlu"]).problems()) == [
        "eval.harness.tasks=['mmlu'] needs a package that is not installed; run: pip install lm-eval==0.4.13"
    ]
    assert not list(HarnessConfig().problems())


def test_wishes_that_cannot_be_are_named_at_once() -> None:
    assert len(list(HarnessConfig(include_path="/nowhere", limit=0, shots=-1, batch_rows=0).problems())) == 4
