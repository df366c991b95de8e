"""Memory over time survives a process that is killed in the middle of a line."""

import json
from pathlib import Path

from finetune.memory import PeakMemory


def test_half_a_line_of_a_killed_process_is_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "memory.jsonl"
    file.write_text('{"stage": "data"}\n{"stage": "tr')
    with PeakMemory(file, stage="train"):
        pass
    stages = [json.loads(line)["stage"] for line in file.read_text().splitlines()]
    assert stages[0] == "data"
    assert set(stages[1:]) == {"train"}
