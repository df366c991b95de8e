"""The served run, shared by the tests of this folder."""

import pytest

pytest.importorskip("fastapi", reason="needs pip install 'finetune-qlora[serve]'")

from tests.fixtures.served import served_line, served_run, server

__all__ = ["served_line", "served_run", "server"]
