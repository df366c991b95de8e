"""Reads files as rows, each with its line number, so that every later message can point to it."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from finetune.data.arrow_rows import LINES, unpad
from finetune.data.json_array import ArrayReader, reject_constant, reject_duplicate_keys
from finetune.data.limit_config import LIMITS, SMALLEST_LINE_BYTES, LimitConfig
from finetune.errors import DataError
from finetune.files import first_error_line

Raw = tuple[int, Any]
"""Line (or number within the file) and the row: unparsed JSON as bytes, or a dict."""

COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".text", ".md")
BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
BATCH_ROWS = 1000
BLOCK_BYTES = SMALLEST_LINE_BYTES
UNCHECKED_BYTES = 64 * 1024**2
"""Files may be decompressed to this size whatever their own: short ones are often repetitive."""


def file_kind(path: Path) -> str:
    """Returns the suffix that decides how a file is read, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def rows(path: Path, *, text_unit: str, changes: Counter[str], limits: LimitConfig = LIMITS) -> Iterator[Raw]:
    """Streams the rows of one file.

    Args:
        path: The file.
        text_unit: What one row of a text file is.
        changes: Receives how many values were changed in reading, by kind; see `arrow_rows`.
        limits: Of its lines and of what it is decompressed to.

    Raises:
        DataError: The file is missing, empty, unreadable, damaged, beyond a limit, or of an unknown kind.
    """
    kind = file_kind(path)
    if kind not in SUFFIXES:
        raise DataError(
            f"{path}: unknown file type; known types are {', '.join(SUFFIXES)}, each also as .gz, .bz2, .xz"
        )
    seen = False
    try:
        for raw in _of_kind(path, kind, text_unit, changes, limits):
            seen = True
            yield raw
    except UnicodeDecodeError as error:
        raise DataError(f"{path}{_not_utf8(path, limits)} ({error.reason}); save the file as UTF-8") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed file is damaged or truncated ({error}); download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check its name and permissions") from error
    if not seen:
        raise DataError(f"{path}: contains no rows; remove it from data.path")


def _not_utf8(path: Path, limits: LimitConfig) -> str:
    """Finds the line that is not UTF-8. Decoders report only the position in their own block."""
    with open_bytes(path, limits) as handle:
        for number, line in enumerate(handle, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f":{number}: not UTF-8 at byte {error.start} of the line"
    return ": not UTF-8"


def _of_kind(path: Path, kind: str, text_unit: str, changes: Counter[str], limits: LimitConfig) -> Iterator[Raw]:
    if kind == ".parquet":
        return _parquet(path, changes)
    if kind == ".arrow":
        return _arrow(path, changes)
    if kind in (".csv", ".tsv"):
        return _csv(path, "\t" if kind == ".tsv" else ",", changes, limits)
    if kind in (".txt", ".text", ".md"):
        return _text(path, text_unit, limits)
    if kind == ".json":
        return _json(path, limits)
    return _jsonl(path, limits)


class _Limited(io.RawIOBase):
    """Reads a file, decompressed, and stops where a line or the whole grows beyond a limit."""

    def __init__(self, path: Path, handle: IO[bytes], limits: LimitConfig, *, has_lines: bool) -> None:
        self.path, self.handle, self.limits, self.has_lines = path, handle, limits, has_lines
        self.line_bytes = 0
        self.most_bytes = max(UNCHECKED_BYTES, limits.compression_ratio * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.line_bytes = 0
        return self.handle.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        block = self.handle.read(len(buffer))
        buffer[: len(block)] = block
        end = block.rfind(b"\n")
        self.line_bytes = self.line_bytes + len(block) if end < 0 else len(block) - end - 1
        if self.has_lines and self.line_bytes > self.limits.line_bytes:
            raise DataError(f"{self.path}: a line is longer than {_limit('line_bytes', self.limits)}")
        if self.handle.tell() > self.most_bytes:
            ratio = _limit("compression_ratio", self.limits, unit=" times its size")
            raise DataError(f"{self.path}: decompresses to more than {ratio}")
        return len(block)

    def close(self) -> None:
        self.handle.close()
        super().close()


def _limit(name: str, limits: LimitConfig, *, unit: str = " bytes") -> str:
    return f"{getattr(limits, name):,}{unit}; check the file, or raise data.limits.{name}"


def open_bytes(path: Path, limits: LimitConfig, *, has_lines: bool = False) -> IO[bytes]:
    """Opens a file, decompressed, after a check of its first bytes."""
    opener = COMPRESSED.get(path.suffix.lower(), open)
    handle: IO[bytes] = opener(path, "rb")  # type: ignore[operator]
    start = handle.read(4)
    if start[:2] in BOMS:
        handle.close()
        raise DataError(f"{path}: is {BOMS[start[:2]]}; save the file as UTF-8")
    if start[:2] == b"\x1f\x8b":
        handle.close()
        raise DataError(f"{path}: is compressed with gzip but its name does not say so; rename it to {path.name}.gz")
    handle.seek(3 if start[:3] == b"\xef\xbb\xbf" else 0)
    return io.BufferedReader(_Limited(path, handle, limits, has_lines=has_lines), BLOCK_BYTES)


def _jsonl(path: Path, limits: LimitConfig) -> Iterator[Raw]:
    with open_bytes(path, limits, has_lines=True) as handle:
        for line, raw in enumerate(handle, 1):
            if not raw.isspace():
                yield line, raw


def _json(path: Path, limits: LimitConfig) -> Iterator[Raw]:
    """Reads an array, JSON lines under another name, or one object that contains the array."""
    with open_bytes(path, limits) as handle:
        start = handle.tell()
        first = handle.readline()
        while first.isspace():
            first = handle.readline()
        handle.seek(start)
        if not first.lstrip().startswith(b"{"):
            text = io.TextIOWrapper(handle, encoding="utf-8")
            yield from ArrayReader(path, text, longest=limits.line_bytes).elements()
            return
        if _is_row(first):
            yield from ((line, raw) for line, raw in enumerate(handle, 1) if not raw.isspace())
            return
        yield from _wrapped(path, handle.read())


def _is_row(line: bytes) -> bool:
    """Returns whether a line is a complete row, and not an object around a list of rows."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    return not (len(value) == 1 and len(lists) == 1 and "messages" not in value and "conversations" not in value)


def _wrapped(path: Path, content: bytes) -> Iterator[Raw]:
    try:
        value = json.loads(content, object_pairs_hook=reject_duplicate_keys, parse_constant=reject_constant)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg}, column {error.colno}; fix the file"
        ) from error
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}; fix the file") from error
    except RecursionError as error:
        raise DataError(f"{path}: is nested too deeply; fix the file") from error
    lists = {name: item for name, item in value.items() if isinstance(item, list)}
    if len(lists) != 1:
        keys = f"the keys {', '.join(list(value)[:8])}{' ...' if len(value) > 8 else ''}" if value else "no keys"
        raise DataError(f"{path}: is one object with {keys}, not a list of rows; write a JSON array or JSON lines")
    yield from enumerate(next(iter(lists.values())), 1)


def _csv(path: Path, delimiter: str, changes: Counter[str], limits: LimitConfig) -> Iterator[Raw]:
    csv.field_size_limit(limits.line_bytes)
    with io.TextIOWrapper(open_bytes(path, limits, has_lines=True), encoding="utf-8", newline="") as handle:
        reader = csv.reader(handle, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            _check_header(path, header, delimiter)
            for cells in reader:
                if any("\r" in cell for cell in cells):
                    changes[LINES] += sum(cell.count("\r") for cell in cells)
                    cells = [cell.replace("\r\n", "\n").replace("\r", "\n") for cell in cells]
                if len(cells) == len(header):
                    yield reader.line_num, dict(zip(header, cells, strict=True))
                elif cells:
                    yield reader.line_num, (len(cells), len(header))
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.line_num}: not valid CSV: {error}; double the quotes inside a cell"
            ) from error


def _check_repeated(where: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: the column {repeated[0]!r} appears twice; give each column its own name")


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    _check_repeated(f"{path}:1", header)
    if len(header) == 1 and delimiter == "," and any(mark in header[0] for mark in ";\t|"):
        raise DataError(
            f"{path}:1: one column named {header[0]!r}: cells are not separated by commas; save the file with commas"
        )


def _text(path: Path, unit: str, limits: LimitConfig) -> Iterator[Raw]:
    with io.TextIOWrapper(open_bytes(path, limits, has_lines=unit != "file"), encoding="utf-8") as handle:
        if unit == "file":
            content = handle.read()
            if content.strip():
                yield 1, {"text": content}
            return
        start, paragraph = 1, list[str]()
        for line, text in enumerate(handle, 1):
            if unit == "line":
                if text.strip():
                    yield line, {"text": text.rstrip("\n")}
            elif text.strip():
                start = start if paragraph else line
                paragraph.append(text)
            elif paragraph:
                yield start, {"text": "".join(paragraph).rstrip("\n")}
                paragraph = []
        if paragraph:
            yield start, {"text": "".join(paragraph).rstrip("\n")}


def _parquet(path: Path, changes: Counter[str]) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_repeated(str(path), file.schema_arrow.names)
        batches = file.iter_batches(batch_size=BATCH_ROWS)
        yield from enumerate((unpad(row, changes) for batch in batches for row in batch.to_pylist()), 1)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the last two: a value that Python lacks
        raise DataError(f"{path}: cannot be read as Parquet: {first_error_line(error)}; write it again") from error


def _arrow(path: Path, changes: Counter[str]) -> Iterator[Raw]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_stream(source)
                batches = iter(reader)
            except pyarrow.ArrowInvalid:
                source.seek(0)
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            _check_repeated(str(path), reader.schema.names)
            yield from enumerate((unpad(row, changes) for batch in batches for row in batch.to_pylist()), 1)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read as Arrow: {first_error_line(error)}; write it again") from error
