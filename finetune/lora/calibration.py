"""Some training documents, cut out of their packs: what EVA looks at."""

from pathlib import Path


def read_documents(folder: Path, *, tokens: int) -> list[list[int]]:
    """Token ids of the first documents of a training set, about so many tokens of them.

    Args:
        folder: As the data room wrote it: rows with ``input_ids`` and ``seq_lengths``.
        tokens: Documents are taken until they have this many.
    """
    from datasets import load_from_disk

    found: list[list[int]] = []
    left = tokens
    for pack in load_from_disk(str(folder)):
        start = 0
        for length in pack["seq_lengths"]:
            found.append(pack["input_ids"][start : start + length][:left])
            start += length
            left -= len(found[-1])
            if left <= 0:
                return found
    return found
