"""More than 200 broken model folders and GGUF files: each is refused with one message, whatever libraries do with it.

All are opened in one process, in the order of a run: config, dimensions, tokenizer, template, layers, weights.
"""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from finetune.chat_templates import tokenizer_template
from finetune.cli import main
from finetune.compatibility import build_without_weights, check_stored_form
from finetune.config_json import from_config_json
from finetune.data import template
from finetune.errors import EXIT_USAGE, FinetuneError
from finetune.model import ModelSpec
from finetune.model.base import fetch, find
from finetune.model.load import load_tokenizer
from tests.fixtures.bad_models import BAD_GGUFS, Damage, bad_models
from tests.fixtures.models import PLACEMENT, model_config, quantization_config
from tests.fixtures.overrides import overrides

CASES = dict(bad_models())
FILES = sorted({name.partition(":")[0] for name in CASES})
LONGEST_MESSAGE = 1500


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(CASES) + len(BAD_GGUFS) > 200


def open_as_a_run_does(folder: Path, *, method: str) -> None:
    config = model_config(folder)
    files = find(config)
    from_config_json(folder)
    tokenizer_template(folder)
    template.inspect_template(load_tokenizer(files))
    check_stored_form(folder, method=method)
    build_without_weights(config, folder)
    base = fetch(config, files)
    ModelSpec(base=base, config=config, quantization=quantization_config(method), placement=PLACEMENT).load()


def problem(folder: Path, *, method: str = "none") -> str:
    """Returns what is wrong with a refusal; empty where it is one message with a remedy."""
    try:
        open_as_a_run_does(folder, method=method)
    except FinetuneError as error:
        text = str(error)
        if error.exit_code != EXIT_USAGE or "; " not in text or len(text) > LONGEST_MESSAGE:
            return f"refused with {text!r}"
        return ""
    except Exception as error:  # noqa: BLE001 - what a user would see as a traceback
        return f"ends in {type(error).__name__}: {error}"
    return "is taken as if nothing were wrong"


def damaged(base: Path, target: Path, damage: Damage) -> Path:
    shutil.copytree(base, target)
    damage(target)
    return target


@pytest.mark.parametrize("file", FILES)
def test_a_broken_folder_is_refused_with_one_message(file: str, tiny_base: Path, tmp_path: Path) -> None:
    wrong = {}
    for number, (name, damage) in enumerate(CASES.items()):
        if name.startswith(f"{file}:"):
            wrong[name] = problem(damaged(tiny_base, tmp_path / str(number), damage))
    assert {name: text for name, text in wrong.items() if text} == {}


def test_the_good_base_is_taken(tiny_base: Path) -> None:
    for method in ("none", "nf4"):
        open_as_a_run_does(tiny_base, method=method)


def test_broken_weights_are_refused_where_they_are_quantized(tiny_base: Path, tmp_path: Path) -> None:
    names = [name for name in CASES if name.startswith(("model.safetensors:", "index:")) or "num_hidden_layers" in name]
    wrong = {
        name: problem(damaged(tiny_base, tmp_path / str(i), CASES[name]), method="nf4") for i, name in enumerate(names)
    }
    assert {name: text for name, text in wrong.items() if text} == {}


@pytest.mark.parametrize("name", BAD_GGUFS)
def test_a_broken_gguf_is_refused_with_one_message(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(BAD_GGUFS[name])
    assert problem(file) == ""
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


LINES = ["config.json: a list", "tokenizer.json: no model", "config.json: num_hidden_layers=-1", "config.json: a pipe"]


@pytest.mark.parametrize("name", LINES)
def test_the_command_line_ends_with_2_and_the_message(
    name: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = damaged(tiny_base, tmp_path / "base", CASES[name])
    assert main([*overrides(tmp_path, base), "tracking=[]", "run.until=data"]) == EXIT_USAGE
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert Counter(shown.split())["model.name:"] == 1
