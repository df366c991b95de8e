"""The run that the tests of this package share."""

from tests.fixtures.tiny_run import tiny_run

__all__ = ["tiny_run"]
