"""The chat in the terminal: what is piped in, its commands, and base and tuned answers."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.cli import main
from finetune.inference.generation import generate
from tests.fixtures.served import ENDS

QUESTION = "Wake me at seven on Monday, please."


@pytest.fixture(scope="module")
def answers(served_run: Path) -> dict[str, str]:
    """Greedy answers of the trained graph and its base by the project's own generation."""
    model, tokenizer = finetune.load(served_run)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    def answer() -> str:
        (tokens,) = generate(model, tokenizer, [prompt], max_new_tokens=12, batch_rows=1, ends=ENDS)
        return str(tokenizer.decode(tokens.tokens, skip_special_tokens=True))

    tuned = answer()
    with model.disable_adapter():
        return {"adapter": tuned, "base": answer()}


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], served_run: Path, *lines: str, flags: Any = ()
) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    code = main(["chat", f"run.root={served_run.parent}", "run.name=tiny", "--max-tokens", "12", *flags])
    printed = capsys.readouterr()
    assert code == 0
    return printed.out, printed.err


def test_piped_question_is_answered_and_nothing_else_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], served_run: Path, answers: dict[str, str]
) -> None:
    out, err = run(monkeypatch, capsys, served_run, QUESTION)
    assert out == answers["adapter"] + "\n"
    assert "the answer reached its limit of 12 tokens" in err


def test_base_and_tuned_answer_next_to_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], served_run: Path, answers: dict[str, str]
) -> None:
    out, _ = run(monkeypatch, capsys, served_run, QUESTION, flags=["--compare"])
    assert out == f"base: {answers['base']}\ntuned: {answers['adapter']}\n"


def test_commands_change_the_model_and_the_conversation(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    served_run: Path,
    answers: dict[str, str],
    tmp_path: Path,
) -> None:
    file = tmp_path / "chat.jsonl"
    lines = ["/model base", QUESTION, "/temperature -1", "/nonsense", "/model gguf", f"/save {file}", "/reset"]
    out, err = run(monkeypatch, capsys, served_run, *lines, "/system Be short.", "/save", "/model adapter", QUESTION)
    assert out.splitlines()[1] == answers["base"].splitlines()[0]
    saved = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert saved[1]["content"] == answers["base"]
    assert "/temperature: must be a number between 0 and 2; got '-1'" in err
    assert "/nonsense: not a command; /help lists them" in err
    assert "--models gguf: tiny has adapter, base, merged" in err
    assert "/save: give a file" in err
    assert not out.endswith(answers["adapter"] + "\n"), "the system message changes the answer"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "chat: give run.name=x, or the folder of a run or export, or a .gguf file; got none"),
        (["run.name=missing"], "outputs/missing holds no run; name a run that exists"),
        (["missing.gguf"], "missing.gguf does not exist; give the path of a .gguf file"),
        (["--temperature", "-1", "run.name=x"], "chat --temperature needs a value"),
        (["--model", "other", "run.name=x"], "chat --model must be one of adapter, base, merged, gguf; got 'other'"),
    ],
)
def test_bad_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *words]) == 2
    assert message in capsys.readouterr().err
