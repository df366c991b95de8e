"""What is trained at a turn is what serving sends and expects there, for every template."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from finetune.chat_templates import find_template, read_template, template_names, tokenizer_template, trl_templates
from finetune.data import DataConfig, prove
from finetune.data.limit_config import LimitConfig
from finetune.data.proof_chats import TOOL, proof_chats
from finetune.data.prove import prove_template
from finetune.data.turns import Row, Turns
from finetune.errors import ConfigError, DataError
from finetune.inference.rows import IGNORED
from finetune.paths import CONF
from finetune.products import PreparedData
from tests.data.helpers import ledger, split, trained_text
from tests.fixtures.scripts import script

Run = Callable[..., PreparedData]
THOUGHT = "<think>\nIt is day.\n</think>\n\n"
EXCHANGES = [("What is up?", "The sky."), ("And down?", "The soil.")]


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return script("make_template_table")


def chat(*exchanges: tuple[str, str], **more: Any) -> dict[str, Any]:
    messages = [
        message
        for question, answer in exchanges
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    return {"messages": messages, **more}


def prompt_ids(row: dict[str, Any]) -> list[int]:
    """Returns the tokens before the only trained span of a row."""
    start = next(number for number, label in enumerate(row["labels"]) if label != IGNORED)
    return row["input_ids"][:start]


def served_ids(tokenizer: Any, messages: list[Any], **variables: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **variables)[
        "input_ids"
    ]


def test_every_template_is_as_the_table_of_the_docs_has_it(table: ModuleType) -> None:
    config = table.data_config()
    results = {name: table.proofs(name, config) for name in (*trl_templates(), *template_names())}
    assert len(results) > 40
    documented = table.PAGE.read_text(encoding="utf-8").partition(table.HEADING)
    assert table.section(results) == documented[1] + documented[2], "run python scripts/make_template_table.py"


def test_no_turn_of_any_template_is_trained_in_another_way_than_it_is_served(table: ModuleType) -> None:
    page = table.PAGE.read_text(encoding="utf-8").partition(table.HEADING)[2]
    assert "PASS" in page
    assert "DIFFERS" not in page


def one_row(turns: Turns, trained: list[bool], *, apart: bool = False) -> list[Row]:
    """Trains all turns in the text of the whole conversation, wherever their words are: what a naive mask does."""
    text = turns.template.render(turns.messages)
    spans = {}
    for number, message in enumerate(turns.messages):
        if trained[number]:
            start = text.index(message["content"])
            spans[number] = (start, text.index("<|im_end|>", start) + len("<|im_end|>"))
    return [Row(text, turns._answer(len(turns.messages) - 1), spans)]


def twice(turns: Turns, trained: list[bool], *, apart: bool = False) -> list[Row]:
    return [row for row in ORIGINAL(turns, trained, apart=True) for _ in (1, 2)]


def early(turns: Turns, trained: list[bool], *, apart: bool = False) -> list[Row]:
    rows = ORIGINAL(turns, trained, apart=apart)
    return [
        replace(row, spans={n: (start, end - len("<|im_end|>")) for n, (start, end) in row.spans.items()})
        for row in rows
    ]


ORIGINAL = Turns.rows


@pytest.mark.parametrize(
    ("bug", "problem"),
    [(one_row, "serving sends"), (twice, "trained on in 2 rows"), (early, "not trained: '<|im_end|>")],
)
def test_the_proof_finds_planted_bugs(
    table: ModuleType, bug: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Turns, "rows", bug)
    chats = [(name, each) for name, each in proof_chats() if name == "two exchanges"]
    (proof,) = prove_template(table.data_config(), table.template_tokenizer("trl:qwen3"), chats)
    assert problem in proof.verdict


def test_a_conversation_becomes_a_row_for_each_turn_where_its_history_is_rewritten(run: Run, table: ModuleType) -> None:
    row = chat(*EXCHANGES)
    product = run([row], with_tokenizer=table.template_tokenizer("trl:qwen3"))
    original = table.template_tokenizer("trl:qwen3")
    last, first = sorted(split(product, "train"), key=lambda each: -len(each["input_ids"]))
    for trained, count, answer in ((first, 1, "The sky."), (last, 3, "The soil.")):
        assert prompt_ids(trained) == served_ids(original, row["messages"][:count], enable_thinking=False)
        assert trained_text(trained, original) == f"{answer}<|im_end|>"
    assert (product.rows["kept"], product.rows["rewritten"], product.rows["rewritten_pieces"]) == (1, 1, 2)
    assert [line["pieces"] for line in ledger(product)] == [2]
    assert product.packed_rows == 2


def test_a_held_out_conversation_is_evaluated_on_its_last_turn(run: Run, table: ModuleType) -> None:
    rows = [chat(*EXCHANGES), chat(("Who?", "Me."), ("Why?", "So."))]
    product = run(rows, with_tokenizer=table.template_tokenizer("trl:qwen3"), heldout_rows=1)
    (heldout,) = split(product, "heldout")
    assert heldout["reference"] in ("The soil.", "So.")
    assert any("evaluated on their last turn" in warning for warning in product.warnings)


def test_a_conversation_stays_one_row_where_its_history_is_kept(run: Run, table: ModuleType) -> None:
    product = run([chat(*EXCHANGES)], with_tokenizer=table.template_tokenizer("trl:qwen2_5"))
    (row,) = split(product, "train")
    assert trained_text(row, table.template_tokenizer("trl:qwen2_5")) == "The sky.<|im_end|>The soil.<|im_end|>"
    assert product.rows["rewritten"] == 0


def test_turns_are_apart_where_tokens_of_a_prompt_depend_on_the_answer(run: Run, table: ModuleType) -> None:
    tokenizer = table.template_tokenizer("llama3", looks_ahead=True)
    row = chat(*EXCHANGES)
    product = run([row], with_tokenizer=tokenizer)
    prompts = sorted(map(prompt_ids, split(product, "train")), key=len)
    assert prompts == [served_ids(tokenizer, row["messages"][:count]) for count in (1, 3)]


@pytest.mark.parametrize(
    ("setting", "trained", "enabled"),
    [
        ("train", f"{THOUGHT}The sky.<|im_end|>", True),
        ("auto", f"{THOUGHT}The sky.<|im_end|>", True),
        ("off", "The sky.<|im_end|>", False),
        ("drop", "<think>\n\n</think>\n\nThe sky.<|im_end|>", None),
    ],
)
@pytest.mark.parametrize("key", ["content", "reasoning_content", "thinking"])
def test_thoughts_are_trained_or_removed_as_set(
    run: Run, table: ModuleType, setting: str, trained: str, enabled: bool | None, key: str
) -> None:
    row = chat(("What is up?", f"{THOUGHT}The sky." if key == "content" else "The sky."))
    if key != "content":
        row["messages"][1][key] = "It is day."
    tokenizer, original = table.template_tokenizer("trl:qwen3"), table.template_tokenizer("trl:qwen3")
    product = run([row], with_tokenizer=tokenizer, thinking=setting)
    (prepared,) = split(product, "train")
    assert trained_text(prepared, original) == trained
    variables = {} if enabled is None else {"enable_thinking": enabled}
    assert prompt_ids(prepared) == served_ids(original, row["messages"][:1], **variables)
    removed = any("thoughts, which are removed" in warning for warning in product.warnings)
    assert removed == (setting in ("off", "drop"))


def test_thoughts_of_tool_calls_stay_where_tools_become_text(run: Run, table: ModuleType) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "It is day."}
    row = {"messages": [{"role": "user", "content": "Rome?"}, answer], "tools": [TOOL]}
    product = run([row], with_tokenizer=table.template_tokenizer("trl:qwen3"), tools="text", max_tokens=1024)
    (prepared,) = split(product, "train")
    assert trained_text(prepared, table.template_tokenizer("trl:qwen3")).startswith(f"{THOUGHT}<tool_call>")


@pytest.mark.parametrize("name", ["trl:qwen3", "trl:qwen3_5_think", "trl:glm4moe", "trl:gemma4_v5", "trl:qwen3_8"])
@pytest.mark.parametrize("enabled", [False, True])
def test_the_exported_template_serves_in_the_trained_mode(
    run: Run, table: ModuleType, name: str, enabled: bool
) -> None:
    tokenizer, original = table.template_tokenizer(name), table.template_tokenizer(name)
    product = run(
        [chat(EXCHANGES[0])], with_tokenizer=tokenizer, thinking="train" if enabled else "off", max_tokens=512
    )
    question = [{"role": "user", "content": "What is up?"}]
    tokenizer.chat_template = json.loads((product.folder / "rendering.json").read_text())["template"]
    expected = {on: served_ids(original, question, enable_thinking=on) for on in (False, True)}
    assert served_ids(tokenizer, question) == expected[enabled]
    assert served_ids(tokenizer, question, enable_thinking=True) == expected[enabled]
    assert served_ids(tokenizer, question, enable_thinking=False) == expected[False]


def test_a_later_row_with_a_thought_is_named_where_the_first_rows_have_none(run: Run, table: ModuleType) -> None:
    rows = [chat((f"Question {number}?", f"Answer {number}.")) for number in range(200)]
    rows.append(chat(("What is up?", f"{THOUGHT}The sky.")))
    product = run(rows, with_tokenizer=table.template_tokenizer("trl:qwen3"), bad_rows="drop")
    assert product.rows["dropped"] == {"a row has a thought, and the first rows have none": 1}


def test_an_answer_without_a_thought_is_counted_where_the_model_is_asked_to_think(run: Run, table: ModuleType) -> None:
    rows = [chat(EXCHANGES[0]), chat(("What is up?", f"{THOUGHT}The sky."))]
    product = run(rows, with_tokenizer=table.template_tokenizer("trl:qwen3_5_think"))
    assert any(warning.startswith("1 rows have an answer without a thought") for warning in product.warnings)


def test_a_date_is_fixed(run: Run, table: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = table.template_tokenizer("trl:llama3_2")
    product = run([chat(EXCHANGES[0])], with_tokenizer=tokenizer, template_date="2025-02-03")
    (row,) = split(product, "train")
    assert "Today Date: 03 Feb 2025" in tokenizer.decode(row["input_ids"])
    assert "2025-02-03 (data.template_date)" in capsys.readouterr().out


def test_trimmed_answers_are_counted(run: Run, table: ModuleType) -> None:
    rows = [chat(EXCHANGES[0]), chat(("What is up?", "\n The sky. "))]
    product = run(rows, with_tokenizer=table.template_tokenizer("llama3"), duplicates="keep")
    assert any(warning.startswith("1 rows have an answer that begins or ends") for warning in product.warnings)


def test_a_refused_system_message_is_the_settings_fault(run: Run, table: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"data\.system is set, and the model's chat template refuses it"):
        run([chat(EXCHANGES[0])], with_tokenizer=table.template_tokenizer("gemma"), system="Be kind.")


DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TIME, MEMORY, TEXT = "0.3 s of processor time", "953.7 MiB of memory", "a text of 10,000,000 characters"
TOO_MUCH = {
    "nested loops": (LOOP, TIME),
    "recursion": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", TIME),
    "a large power": ("{{ 7 ** (10 ** 8) % 3 }}", TIME),
    "a large power of a length": ("{{ (messages | length + 5) ** (10 ** 8) % 3 }}", TIME),
    "sentences without end": ("{{ lipsum(n=10 ** 9) }}", TIME),
    "10 GB of a constant": ("{{ 'x' * 10 ** 10 }}", MEMORY),
    "10 GB of a turn": ("{{ messages[0].content * 10 ** 9 }}", MEMORY),
    "10 GB of white space": ("{{ messages[0].content | center(10 ** 10) }}", MEMORY),
    "10 GB of indentation": ("{{ 'a\nb' | indent(10 ** 10) }}", MEMORY),
    "10 GB of JSON": ("{{ [1] | tojson(indent=10 ** 10) }}", MEMORY),
    "a list without end": ("{{ [1] | batch(10 ** 10, 'x') | list }}", MEMORY),
    "a text that doubles": (DOUBLED, MEMORY),
    "a text of 30 MB": ("{{ messages[0].content * 10 ** 6 * 2 }}", TEXT),
}
"""What a template asks for, and the limit that ends it."""


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_template_that_needs_too_much_ends_with_one_message(run: Run, table: ModuleType, name: str) -> None:
    asked, limit = TOO_MUCH[name]
    tokenizer = table.template_tokenizer("chatml")
    tokenizer.chat_template = asked + tokenizer.chat_template
    limits = LimitConfig(template_seconds=0.3 if limit == TIME else 10)
    started = time.process_time()
    with pytest.raises(DataError, match=r"^data\.template: the chat template needs more than ") as caught:
        run([chat(EXCHANGES[0])], with_tokenizer=tokenizer, limits=limits)
    assert f"needs more than {limit} for one conversation, which begins with 'Which way is up'; " in str(caught.value)
    assert "choose another with data.template=..., or raise the limit in data.limits" in str(caught.value)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("workers", [1, 2])
def test_a_template_that_needs_too_much_for_a_row_names_the_conversation(
    run: Run, table: ModuleType, workers: int
) -> None:
    tokenizer = table.template_tokenizer("chatml")
    tokenizer.chat_template = "{% if 'never' in messages[0].content %}" + LOOP + "{% endif %}" + tokenizer.chat_template
    rows = [chat(EXCHANGES[0]), chat(("It never ends?", "No."))]
    with pytest.raises(DataError, match="which begins with 'It never ends"):
        run(rows, with_tokenizer=tokenizer, workers=workers, limits=LimitConfig(template_seconds=0.3))


@pytest.mark.parametrize("source", ["{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "{{ cycler() }}", "{{ 1 / 0 }}"])
def test_a_template_that_python_refuses_is_one_message(run: Run, table: ModuleType, source: str) -> None:
    tokenizer = table.template_tokenizer("chatml")
    tokenizer.chat_template = source
    with pytest.raises(DataError, match=r"^data\.template: the chat template cannot render a question and its answer"):
        run([chat(EXCHANGES[0])], with_tokenizer=tokenizer)


def test_a_long_row_is_no_fault_of_the_template(run: Run, table: ModuleType) -> None:
    rows = [chat(("What is up?", "The sky. " * 2_000_000)), chat(EXCHANGES[0])]
    product = run(rows, with_tokenizer=table.template_tokenizer("chatml"), bad_rows="drop")
    assert product.rows["dropped"] == {"longer than max_tokens": 1}


def test_named_templates_are_used_as_transformers_uses_them_and_survive(
    run: Run, table: ModuleType, tmp_path: Path
) -> None:
    tokenizer = table.template_tokenizer("qwen")
    tokenizer.chat_template = {"default": read_template("chatml"), "tool_use": read_template("qwen")}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    }
    rows = [chat(EXCHANGES[0]), {"messages": [{"role": "user", "content": "Rome?"}, call], "tools": [TOOL]}]
    product = run(rows, with_tokenizer=tokenizer, max_tokens=1024)
    prompts = [prompt_ids(row) for row in split(product, "train")]
    assert served_ids(tokenizer, rows[0]["messages"][:1]) in prompts
    assert served_ids(tokenizer, rows[1]["messages"][:1], tools=[TOOL]) in prompts
    assert set(json.loads((product.folder / "rendering.json").read_text())["template"]) == {"default", "tool_use"}
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_template(tmp_path / "saved") == tokenizer.chat_template


def test_the_users_own_rows_are_compared(table: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(chat(*EXCHANGES)) + "\n")
    proofs = prove(replace_path(table.data_config(), file), table.template_tokenizer("trl:qwen3"))
    assert (proofs[-1].name, proofs[-1].verdict, proofs[-1].rows) == ("rows.jsonl:1", "PASS", 2)


def replace_path(config: DataConfig, file: Path) -> DataConfig:
    return replace(config, path=str(file), heldout_path=None)


def test_every_model_option_names_a_template_that_exists() -> None:
    options = {file.stem: yaml.safe_load(file.read_text()) for file in (CONF / "model").glob("*.yaml")}
    named = {name: option["template"] for name, option in options.items() if option.get("template")}
    assert {"llama2_7b", "llama3_8b", "mistral_7b", "gemma2_9b", "llama1_7b", "falcon_7b", "phi2"} <= set(named)
    assert set(named.values()) <= set(template_names())


def test_the_template_of_a_tokenizer_is_found_from_its_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert tokenizer_template(tmp_path) is None
    listed = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    assert tokenizer_template(tmp_path) == {"default": "a", "tool_use": "b"}


def test_a_name_without_a_template_is_an_error_of_its_setting() -> None:
    with pytest.raises(DataError, match=r"model.template: there is no template 'trl:nothing'"):
        find_template("trl:nothing", setting="model.template")
