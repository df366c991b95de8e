"""The adapted tiny model that the checks run on."""

from tests.fixtures.preflight import scene

__all__ = ["scene"]
