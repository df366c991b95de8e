"""Reads rows of known formats as conversations. A new format is one file here and one line in each of the two tables.

Example::

    from finetune.data.formats import READERS, detect

    name, columns = detect(first_rows)
    conversation = READERS[name](row)
"""

from finetune.data.formats.detect import detect, unused_columns
from finetune.data.formats.tables import COLUMNS, READERS, ColumnMapping

__all__ = ["COLUMNS", "READERS", "ColumnMapping", "detect", "unused_columns"]
