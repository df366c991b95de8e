"""The environment of all tests, their order, the slow tests' turn, and the fixtures that several packages share."""

import datetime
import logging
import os
import sys
import zlib

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections import Counter
from collections.abc import Iterator

import pytest
from absl import logging as absl_logging

# rouge-score's logging closes the stream it started with when Hydra sets up its own: that of pytest's capture.
absl_logging.get_absl_handler().python_handler.setStream(sys.__stderr__)

pytest_plugins = [
    "tests.fixtures.models",
    "tests.fixtures.artifacts",
    "tests.fixtures.browser",
    "tests.fixtures.hub",
    "tests.fixtures.one_import",
    "tests.fixtures.tiny_run",
]

TENTHS = 10


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow",
        default="all",
        choices=["all", "none", "today", *map(str, range(TENTHS))],
        help="slow tests to run: all, none, one tenth by its number, or today's tenth",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes ``today`` a number: the day of the year modulo 10, in UTC. Every process of the tests gets the same."""
    if config.option.slow == "today":
        config.option.slow = str(datetime.datetime.now(datetime.UTC).timetuple().tm_yday % TENTHS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out slow tests whose turn it is not. Files with slow tests first, so that no process ends with them."""
    left_out = [item for item in items if item.get_closest_marker("slow") and not has_turn(item, config.option.slow)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def has_turn(item: pytest.Item, turn: str) -> bool:
    """A test's tenth is its name's CRC-32 modulo 10, so that it stays when others come and go."""
    return turn == "all" or turn == str(zlib.crc32(item.nodeid.encode()) % TENTHS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    turn = config.option.slow
    if turn not in ("all", "none"):
        terminalreporter.write_line(
            f"slow tests: tenth {turn} of 0 to {TENTHS - 1} (by day of the year and each test's name); the same again "
            f"with --slow={turn}, all of them with make test-all"
        )


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Takes away the handlers that Hydra adds to the root logger: they write to the closed output of one test."""
    before = list(logging.root.handlers)
    yield
    for handler in [handler for handler in logging.root.handlers if handler not in before]:
        logging.root.removeHandler(handler)
