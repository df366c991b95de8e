"""The environment of all tests, their order, and the fixtures that several packages share."""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections import Counter

import pytest
from absl import logging as absl_logging

# rouge-score's logging closes the stream it started with when Hydra sets up its own: that of pytest's capture.
absl_logging.get_absl_handler().python_handler.setStream(sys.__stderr__)

pytest_plugins = ["tests.fixtures.models", "tests.fixtures.artifacts", "tests.fixtures.hub"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no process is left alone with them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
