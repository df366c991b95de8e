"""General text beside the task: every token of it is measured, whatever file it comes in."""

from pathlib import Path
from typing import Any

import pytest

from finetune.errors import EvalError
from finetune.eval.general import general_rows
from finetune.inference.rows import trained_tokens
from finetune.paths import SHIPPED


def test_blank_lines_part_documents_and_all_their_tokens_are_measured(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Wake me at seven.\r\nOn Monday.\r\n\r\n\r\nWhat is the capital?\n")
    rows = general_rows(file, tokenizer, longest=100)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == [
        "Wake me at seven.\nOn Monday.",
        "What is the capital?",
    ]
    assert [trained_tokens(row) for row in rows] == [len(row["input_ids"]) - 1 for row in rows]


def test_long_document_becomes_several_rows_and_loses_nothing(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Wake me at seven on Monday, please. " * 20)
    rows = general_rows(file, tokenizer, longest=16)
    assert max(len(row["input_ids"]) for row in rows) == 16
    assert [token for row in rows for token in row["input_ids"]] == tokenizer(file.read_text().strip())["input_ids"]


def test_json_lines_hold_text_or_chats(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "Wake me."}\n{"messages": [{"role": "user", "content": "Hello"}]}\n')
    plain, chat = general_rows(file, tokenizer, longest=100)
    assert tokenizer.decode(plain["input_ids"]) == "Wake me."
    assert tokenizer.decode(chat["input_ids"]) == "<|im_start|>user\nHello<|im_end|>\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "holds no text"), ("{", "line 1 is not JSON"), ('{"a": 1}', "line 1 has neither text nor messages")],
)
def test_bad_file_is_named_with_its_line(content: str, said: str, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(EvalError, match=said):
        general_rows(file, tokenizer, longest=100)


def test_shipped_text_has_the_documents_that_its_description_promises(tokenizer: Any) -> None:
    rows = general_rows(SHIPPED / "general.txt", tokenizer, longest=10_000)
    assert len(rows) == 40
    assert "40 short pieces" in (SHIPPED / "README.md").read_text()
