"""Every format becomes the same conversation, and is logged."""

from collections.abc import Callable
from typing import Any

import pytest

from finetune.data.conversation import BadRow
from finetune.data.formats import READERS, detect, unused_columns
from finetune.errors import DataError
from finetune.inference.rows import IGNORED
from finetune.products import PreparedData
from tests.data.helpers import ledger, pair, split, trained_text

TOOL = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}
ASK = [{"role": "user", "content": "q"}]
SAME = {
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "messages": {"messages": [*ASK, {"role": "assistant", "content": "a"}]},
    "prompt_completion": pair("q", "a"),
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "guanaco": {"text": "### Human: q\n### Assistant: a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "unpaired": {**pair("q", "a"), "label": True},
}


@pytest.mark.parametrize("name", SAME)
def test_format_is_detected_from_its_columns(name: str) -> None:
    assert detect([SAME[name]])[0] == name


@pytest.mark.parametrize("name", SAME)
def test_every_format_becomes_the_same_turns(name: str) -> None:
    messages = READERS[name](SAME[name]).messages
    assert [(message["role"], message["content"]) for message in messages] == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize("name", SAME)
def test_every_format_trains_the_answer_and_its_end(
    name: str, run: Callable[..., PreparedData], tokenizer: Any
) -> None:
    product = run([SAME[name]])
    assert trained_text(split(product, "train")[0], tokenizer) == "a<|im_end|>"


@pytest.mark.parametrize(
    ("prompt", "completion"), [("question", "answer"), ("instruction", "response"), ("input", "output")]
)
def test_usual_names_of_pairs_are_mapped(prompt: str, completion: str) -> None:
    assert detect([{prompt: "q", completion: "a"}]) == (
        "prompt_completion",
        {"prompt": prompt, "completion": completion},
    )


BESIDE = [
    (
        {"instruction": "q", "context": "c", "response": "a", "category": "x"},
        ("alpaca", {"input": "context", "output": "response"}),
        ["category"],
    ),
    (
        {"question": "q", "context": {"title": []}, "answer": "a"},
        ("prompt_completion", {"prompt": "question", "completion": "answer"}),
        ["context"],
    ),
    (
        {"system_prompt": "s", "question": "q", "response": "a"},
        ("prompt_completion", {"prompt": "question", "completion": "response", "system": "system_prompt"}),
        [],
    ),
    ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, ("preference", {"prompt": "question"}), []),
    (
        {"id": 7, "input": "q", "target": "a"},
        ("prompt_completion", {"prompt": "input", "completion": "target"}),
        ["id"],
    ),
]


@pytest.mark.parametrize(("row", "found", "left"), BESIDE)
def test_further_columns_are_used_or_named_as_unused(
    row: dict[str, Any], found: tuple[str, dict[str, str]], left: list[str]
) -> None:
    assert detect([row]) == found
    assert unused_columns([row], *found) == left


def test_column_that_only_some_rows_have_does_not_make_them_two_formats() -> None:
    rows = [pair("q", "a"), {**pair("q", "b"), "system_prompt": "s"}]
    assert detect(rows) == ("prompt_completion", {"system": "system_prompt"})


def test_context_is_read_with_its_question(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    product = run([{"question": "Who?", "context": "Ada sits here.", "answer": "Ada."}])
    text = tokenizer.decode(split(product, "train")[0]["input_ids"], skip_special_tokens=False)
    assert "<|im_start|>user\nWho?\n\nAda sits here.<|im_end|>" in text


def test_text_with_a_label_is_not_taken_for_raw_text() -> None:
    with pytest.raises(DataError, match=r"a column 'category' next to 'text'.*completion: category"):
        detect([{"text": "Where is my card?", "category": "card_arrival"}])


@pytest.mark.parametrize(
    "chat", ["<s>[INST] q [/INST] a </s>", "<|im_start|>user\nq<|im_end|>", "### Instruction:\nq\n### Response:\na"]
)
def test_chats_that_are_written_out_are_not_guessed_to_be_raw_text(chat: str) -> None:
    with pytest.raises(DataError, match="contain rendered chats"):
        detect([{"text": chat}, {"text": f"{chat} {chat}"}])


def test_raw_text_may_speak_of_chat_marks() -> None:
    assert detect([{"text": "Llama 2 writes [INST] before a question."}, {"text": "Others do not."}]) == ("text", {})


def test_columns_are_mapped_by_the_users_names(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    product = run([{"ask": "q", "say": "a"}], columns={"prompt": "ask", "completion": "say"})
    assert trained_text(split(product, "train")[0], tokenizer) == "a<|im_end|>"


def test_unknown_name_in_the_mapping_is_refused(run: Callable[..., PreparedData]) -> None:
    with pytest.raises(DataError, match=r"data\.columns\.pompt: the format prompt_completion has no such column"):
        run([pair()], format="prompt_completion", columns={"pompt": "prompt"})


def test_alpaca_puts_system_and_history_first() -> None:
    row = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "a"]]}
    assert [message["content"] for message in READERS["alpaca"](row).messages] == ["s", "q", "a", "i\n\nx", "o"]


def test_tool_calls_of_sharegpt_become_openais() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "lookup", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "lookup"}]',
    }
    conversation = READERS["sharegpt"](row)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1]["tool_calls"][0]["function"] == {"name": "lookup", "arguments": {"a": 1}}
    assert conversation.tools == [{"type": "function", "function": {"name": "lookup"}}]


def test_tools_become_text_for_templates_without_them(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "lookup", "arguments": '{"a": 1}'}}],
    }
    product = run([{"messages": [*ASK, call], "tools": [TOOL]}], tools="text", max_tokens=2048)
    row = split(product, "train")[0]
    assert (
        trained_text(row, tokenizer) == '<tool_call>\n{"name": "lookup", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    )
    assert '{"name": "lookup", "parameters"' in tokenizer.decode(row["input_ids"])


def test_messages_that_say_no_are_not_trained(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    turns = [
        *ASK,
        {"role": "assistant", "content": "bad", "train": False},
        *ASK,
        {"role": "assistant", "content": "good"},
    ]
    product = run([{"messages": turns}])
    assert trained_text(split(product, "train")[0], tokenizer) == "good<|im_end|>"


def test_every_assistant_turn_is_trained_with_its_end(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    turns = [*ASK, {"role": "assistant", "content": "one"}, *ASK, {"role": "assistant", "content": "two"}]
    product = run([{"messages": turns}])
    assert trained_text(split(product, "train")[0], tokenizer) == "one<|im_end|>two<|im_end|>"


def test_answer_that_begins_with_a_newline_is_tokenized_separately_from_its_prompt(
    run: Callable[..., PreparedData], tokenizer: Any
) -> None:
    product = run([pair("q", "\n\n a")])
    row = split(product, "train")[0]
    request = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(request, add_special_tokens=False).input_ids
    assert row["input_ids"][: len(prompt)] == prompt
    assert trained_text(row, tokenizer) == "\n\n a<|im_end|>"


def test_system_message_is_added_where_a_row_has_none(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    own_system = {"messages": [{"role": "system", "content": "mine"}, *ASK, {"role": "assistant", "content": "a"}]}
    product = run([SAME["messages"], own_system], system="yours")
    first, second = (tokenizer.decode(row["input_ids"], skip_special_tokens=False) for row in split(product, "train"))
    assert first.startswith("<|im_start|>system\nyours<|im_end|>")
    assert second.startswith("<|im_start|>system\nmine<|im_end|>")


def test_raw_text_is_trained_on_except_for_its_first_token(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    row = split(run([{"text": "The capital of France is Paris."}]), "train")[0]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]
    assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_completion_learns_what_follows_the_prompt(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    row = split(run([pair("2+2=", "4")], format="completion"), "train")[0]
    assert tokenizer.decode(row["input_ids"]) == "2+2=4<|im_end|>"
    assert trained_text(row, tokenizer) == "4<|im_end|>"


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
WORSE = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]},
        {"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WORSE]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"conversations": '[{"from": "human", "value": "q"}]', "chosen": "a", "rejected": "b"},
        {
            "prompt": [{"from": "human", "value": "q"}],
            "chosen": [{"from": "gpt", "value": "a"}],
            "rejected": [{"from": "gpt", "value": "b"}],
        },
    ],
)
def test_preference_is_read_however_its_prompt_is_written(row: dict[str, Any]) -> None:
    conversation = READERS["preference"](row)
    assert (conversation.messages, conversation.rejected) == ([USER, ASSISTANT], WORSE)


def test_preference_keeps_its_tools() -> None:
    assert READERS["preference"]({**SAME["preference"], "tools": [TOOL]}).tools == [TOOL]
    assert READERS["unpaired"]({**SAME["unpaired"], "tools": [TOOL]}).tools == [TOOL]


def test_unpaired_preference_may_be_sharegpt() -> None:
    row = {**SAME["sharegpt"], "label": False}
    assert detect([row]) == ("unpaired", {})
    conversation = READERS["unpaired"](row)
    assert (conversation.messages, conversation.desirable) == ([USER, ASSISTANT], False)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": 5, "chosen": "a", "rejected": "b"}, "'conversations' is not a list: it is a number"),
        (
            {"prompt": "q", "chosen": "a", "rejected": USER},
            "the rejected answer is not the assistant's: it is the user's",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{"function": None}]}, "a tool has no name: tool 1"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{"function": "name"}]},
            "a tool has no name: tool 1",
        ),
    ],
)
def test_broken_preference_row_has_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        READERS["preference"](row)
    assert str(caught.value) == reason


def test_arguments_of_sharegpt_that_are_json_in_a_string_become_values() -> None:
    call = {"from": "Function_Call", "value": '{"name": "lookup", "arguments": "{\\"a\\": 1}"}'}
    conversation = READERS["sharegpt"]({"conversations": [{"from": "human", "value": "q"}, call]})
    assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_supervised_training_leaves_undesirable_answers_out(run: Callable[..., PreparedData]) -> None:
    product = run([SAME["unpaired"], {**pair("q", "bad"), "label": False}])
    assert product.rows["dropped"] == {"marked undesirable": 1}


def test_preference_row_that_is_cut_keeps_both_answers_its_own(
    run: Callable[..., PreparedData], tokenizer: Any
) -> None:
    product = run(
        [{"prompt": "word " * 90, "chosen": "good", "rejected": "bad"}],
        objective="preference",
        max_tokens=64,
        too_long="truncate_prompt",
    )
    row = split(product, "train")[0]
    assert trained_text(row, tokenizer) == "good<|im_end|>"
    assert trained_text({"labels": row["rejected_labels"]}, tokenizer) == "bad<|im_end|>"


def test_preference_rows_keep_both_answers_for_a_preference_objective(
    run: Callable[..., PreparedData], tokenizer: Any
) -> None:
    row = split(run([SAME["preference"]], objective="preference", packing=True), "train")[0]
    assert trained_text(row, tokenizer) == "a<|im_end|>"
    assert trained_text({"labels": row["rejected_labels"]}, tokenizer) == "b<|im_end|>"


@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
def test_text_files_are_rows_by_line_paragraph_or_whole(
    unit: str, run: Callable[..., PreparedData], tmp_path: Any
) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    product = run(path=str(tmp_path / "a.txt"), text_unit=unit)
    assert [row["line"] for row in ledger(product)] == {"line": [1, 2, 4], "paragraph": [1, 4], "file": [1]}[unit]


@pytest.mark.parametrize(
    "answer",
    [{"content": "I would search."}, {"content": "I search.", "tool_calls": [{"function": {"name": "search"}}]}],
)
@pytest.mark.parametrize("tools", [[{"name": "search"}], None])
def test_name_of_a_tool_in_the_prose_does_not_pass_for_the_tool(
    answer: dict[str, Any], tools: list[Any] | None, run: Callable[..., PreparedData], tokenizer: Any
) -> None:
    row = {
        "messages": [{"role": "user", "content": "search for cats"}, {"role": "assistant", **answer}],
        "tools": tools,
    }
    if not tools and "tool_calls" not in answer:
        assert run([row]).rows["kept"] == 1
        return
    with pytest.raises(DataError, match="the chat template does not write"):
        run([row])


def test_preference_objective_refuses_rows_without_worse_answers(run: Callable[..., PreparedData]) -> None:
    with pytest.raises(DataError, match=r"data\.objective=preference: rows\.jsonl has the format messages"):
        run([SAME["messages"]], objective="preference")


def test_mapping_of_one_column_leaves_the_others_to_be_found(
    run: Callable[..., PreparedData], tokenizer: Any, capsys: Any
) -> None:
    product = run([{"question": "q", "answer": "a", "note": "mine", "id": 3}], columns={"system": "note"})
    assert tokenizer.decode(split(product, "train")[0]["input_ids"], skip_special_tokens=False).startswith(
        "<|im_start|>system\nmine"
    )
    assert "not read: id" in capsys.readouterr().out


def test_rejected_answer_that_is_too_long_is_named(run: Callable[..., PreparedData]) -> None:
    rows = [
        SAME["preference"],
        {"prompt": "q", "chosen": "a", "rejected": "word " * 300},
        {"prompt": "q", "chosen": "word " * 300, "rejected": "b " * 400},
    ]
    assert run(rows, objective="preference").rows["dropped"] == {
        "longer than max_tokens (the rejected answer)": 1,
        "longer than max_tokens": 1,
    }


def test_object_of_lists_is_the_list_of_objects_that_it_stores() -> None:
    """``datasets`` stores a list of objects so."""
    turned = {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}}
    assert detect([turned]) == ("messages", {})
    assert READERS["messages"](turned).messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    with pytest.raises(BadRow, match="an object of lists of different lengths"):
        READERS["messages"]({"messages": {"role": ["user", "assistant"], "content": ["Hi"]}})


def test_bad_row_among_the_first_does_not_hide_the_format() -> None:
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "model", "value": "b"}]}
    assert detect([{"conversations": None}, good, {"id": 3}]) == ("sharegpt", {})
