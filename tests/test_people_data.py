"""The data of ``+experiment=grpo_quick`` are what their script writes."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "data" / "people"


def test_the_script_writes_the_shipped_bytes_and_no_row_twice(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "make_people_data.py"), str(tmp_path)], check=True)
    names, lines = {}, []
    for split in ("train", "heldout"):
        text = (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8")
        assert text == (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8")
        lines += text.splitlines()
        names[split] = {json.loads(json.loads(line)["reference"])["name"] for line in text.splitlines()}
    assert len(set(lines)) == len(lines) == 320
    assert not names["train"] & names["heldout"]
