"""The fixtures that the tests of all formats share."""

from tests.fixtures.exports import merged, run, scorer

__all__ = ["merged", "run", "scorer"]
