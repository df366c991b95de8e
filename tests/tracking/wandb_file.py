"""Reads the .wandb file that W&B writes: LevelDB's log format with protobuf records.

Source: the log format is that of github.com/google/leveldb, doc/log_format.md, after a header of seven bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES = 32768
FILE_HEADER = b":W&B"
FILE_HEADER_BYTES = 7
CHUNK_HEADER_BYTES = 7
WHOLE, LAST = 1, 4


def records(file: Path) -> Iterator[Any]:
    """Every record, as ``wandb.proto.wandb_internal_pb2.Record``."""
    from wandb.proto import wandb_internal_pb2

    content = file.read_bytes()
    assert content.startswith(FILE_HEADER)
    at, pending = FILE_HEADER_BYTES, b""
    while at + CHUNK_HEADER_BYTES <= len(content):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < CHUNK_HEADER_BYTES:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        pending += content[at + CHUNK_HEADER_BYTES : at + CHUNK_HEADER_BYTES + length]
        at += CHUNK_HEADER_BYTES + length
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            pending = b""
            yield record
