"""Memory over time survives a process that is killed in the middle of a line; a container's limit is seen."""

import json
from pathlib import Path

import pytest
import torch

from finetune.memory import MemoryGroup, PeakMemory, memory_group

GIB = 1024**3
NO_LIMIT = 9223372036854771712
"""What control groups of version 1 write where nothing bounds a group."""


def test_half_a_line_of_a_killed_process_is_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "memory.jsonl"
    file.write_text('{"stage": "data"}\n{"stage": "tr')
    with PeakMemory(file, stage="train"):
        pass
    stages = [json.loads(line)["stage"] for line in file.read_text().splitlines()]
    assert stages[0] == "data"
    assert set(stages[1:]) == {"train"}


def group_files(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    return folder


@pytest.mark.parametrize(
    ("path", "limit", "expected"),
    [
        ("/job", 12 * GIB, MemoryGroup(12 * GIB, 3 * GIB)),
        ("/job", NO_LIMIT, None),
        ("/docker/named/by/the/host", 12 * GIB, MemoryGroup(12 * GIB, 3 * GIB)),
    ],
    ids=["limited", "unlimited", "inside a container"],
)
def test_limit_of_control_groups_of_version_1_is_read(
    tmp_path: Path, path: str, limit: int, expected: MemoryGroup | None
) -> None:
    stat = f"hierarchical_memory_limit {limit}\ntotal_cache {8 * GIB}\ntotal_rss {3 * GIB}"
    place = "memory/job/memory.stat" if path == "/job" else "memory/memory.stat"
    root = group_files(tmp_path, {place: stat, "self": f"9:name=systemd:/\n4:memory:{path}\n0::/"})
    assert memory_group(root / "self", root) == expected


def test_smallest_limit_of_version_2_counts_and_file_pages_do_not(tmp_path: Path) -> None:
    files = {
        "self": "0::/user/job",
        "user/job/memory.max": "max",
        "user/memory.max": str(12 * GIB),
        "user/memory.stat": f"anon {3 * GIB}\ninactive_file {4 * GIB}\nactive_file {1 * GIB}",
        "user/memory.current": str(9 * GIB),
    }
    root = group_files(tmp_path, files)
    assert memory_group(root / "self", root) == MemoryGroup(12 * GIB, 4 * GIB)
    (root / "user/memory.max").write_text("max\n")
    assert memory_group(root / "self", root) is None


def test_a_system_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert memory_group(tmp_path / "self", tmp_path) is None


def test_the_peak_is_the_allocators_and_not_the_highest_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is patched in: its allocator saw 9 bytes between two samples of 5."""
    resets: list[int] = []
    for name, answer in (("is_available", True), ("is_initialized", True), ("memory_reserved", 5)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    with PeakMemory(tmp_path / "memory.jsonl", stage="train") as peak:
        pass
    assert (peak.device_bytes, resets) == (9, [1])
    assert {json.loads(line)["device_bytes"] for line in (tmp_path / "memory.jsonl").read_text().splitlines()} == {5}
