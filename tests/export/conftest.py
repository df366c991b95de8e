"""The fixtures that the tests of all formats share."""

from tests.fixtures.exports import judge, merged, run

__all__ = ["judge", "merged", "run"]
