"""What is refused before anything is downloaded, opened or made, and what a plan checks without the hub."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune import checks
from finetune.cli import main
from finetune.config import load
from tests.fixtures.hub import FakeHub
from tests.fixtures.rows import data_overrides, write_rows

SMALL = ["tracking=[]", "preflight=off", "export=[adapter]", "train.steps=1", "lora.rank=4"]


def served(tiny_base: Path, folder: Path, *without: str) -> Path:
    """Copies the tiny base for the hub, without some of its files."""
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns(*without))
    return folder


def set_rope(config: Path, kind: str) -> None:
    content = json.loads(config.read_text())
    content["rope_parameters"] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    config.unlink()  # a link to the tests' common base
    config.write_text(json.dumps(content))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("template", "data.template: the tokenizer has no chat template; choose one of alpaca, chatml,"),
        ("path", "data.path: nowhere.jsonl does not exist"),
        ("heldout", "data.heldout_path: nowhere.jsonl does not exist"),
        (
            "gated",
            "org/tiny is gated: accept its licence at https://huggingface.co/org/tiny, then run `hf auth login`",
        ),
        ("unknown", "model.name=org/other: the hub has no such model, or it is private"),
        ("pickles", "model.name=org/tiny: the repository holds no *.safetensors file"),
        ("tokenizer", "holds no tokenizer; add tokenizer.json"),
        ("template name", "data.template: there is no template 'llama9'"),
        ("rope", "export=gguf_q8_0: "),
        ("tracker", "tracking.swanlab needs the package swanlab"),
    ],
)
def test_a_fault_is_refused_before_a_weight_is_asked_for_or_a_folder_is_made(
    fault: str, message: str, tiny_base: Path, work: Path, fake_hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    without = {"template": ["*.jinja"], "pickles": ["*.safetensors"], "tokenizer": ["*token*", "*.jinja"]}
    fake_hub.models["org/tiny"] = served(tiny_base, work.parent / "served", *without.get(fault, []))
    fake_hub.gated = {"org/tiny"} if fault == "gated" else set()
    rows = write_rows(work.parent / "rows.jsonl", count=8)
    faulty = {
        "path": ["data.path=nowhere.jsonl"],
        "heldout": ["data.heldout_path=nowhere.jsonl"],
        "unknown": ["model.name=org/other"],
        "template name": ["data.template=llama9"],
        "rope": ["export=[gguf_q8_0]"],
        "tracker": ["tracking=[swanlab]"],
    }
    if fault == "rope":
        set_rope(fake_hub.models["org/tiny"] / "config.json", "dynamic")
    settings = ["model.name=org/tiny", f"data.path={rows}", *faulty.get(fault, ["tracking=[wandb]"])]
    assert main(settings) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not fake_hub.weights
    assert not list(work.iterdir())


def test_all_faults_are_named_at_once(work: Path, fake_hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model.name=org/other", "data.path=nowhere.jsonl", "merge.adapters={nothing: 1.0}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("finetune: 3 problems in the configuration:\n")
    for part in ("the hub has no such model", "nowhere.jsonl does not exist", "nothing is not an adapter"):
        assert part in error


def test_weights_are_fetched_when_the_data_are_ready(
    tiny_base: Path, work: Path, fake_hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_hub.models["org/tiny"] = tiny_base
    settings = ["+experiment=quickstart", "model.name=org/tiny", "run.name=tiny", *SMALL, *data_overrides(work.parent)]
    assert main([*settings, "run.until=data"]) == 0, capsys.readouterr().err
    assert (work / "outputs" / "tiny" / "data" / "manifest.json").is_file()
    assert {"config.json", "tokenizer.json"} <= set(fake_hub.downloaded)
    assert not fake_hub.weights
    assert main([*settings, "run.until=model", "run.if_exists=resume"]) == 0, capsys.readouterr().err
    assert fake_hub.weights == ["model.safetensors"]


def test_a_disk_that_is_too_small_for_the_download_and_the_results_is_refused(
    tiny_base: Path, work: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_hub.models["org/tiny"] = tiny_base
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    rows = write_rows(work.parent / "rows.jsonl", count=8)
    assert main(["model.name=org/tiny", f"data.path={rows}"]) == 2
    error = capsys.readouterr().err
    assert "downloading the base and writing the results needs" in error
    assert "1000 B are free" in error
    assert not fake_hub.weights
    assert not list(work.iterdir())


def test_a_finished_data_stage_needs_its_files_no_more(
    tiny_base: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["+experiment=quickstart", f"model.name={tiny_base}", "run.name=tiny", "tracking=[]"]
    settings += [*data_overrides(work.parent), "run.until=data"]
    assert main(settings) == 0, capsys.readouterr().err
    (work.parent / "train.jsonl").unlink()
    assert main([*settings, "run.if_exists=resume"]) == 0, capsys.readouterr().err
    assert main([*settings, "run.name=other"]) == 2
    assert "train.jsonl does not exist" in capsys.readouterr().err


def test_rows_without_chats_need_no_template(tiny_base: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = served(tiny_base, work.parent / "base", "*.jinja")
    (work.parent / "prose.txt").write_text("Rain fell on the roof all night. " * 10)
    (work.parent / "rows.jsonl").write_text('{"text": "Rain fell on the roof."}\n' * 4)
    settings = ["tracking=[]", f"model.name={base}", "run.until=data", "data.heldout_share=0.0", "data.cache=''"]
    for name, rows in (("a", "prose.txt"), ("b", "rows.jsonl")):
        arguments = [*settings, f"run.name={name}", f"data.path={work.parent / rows}", "data.duplicates=keep"]
        assert main(arguments) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.path=nowhere.jsonl"], "data.path: nowhere.jsonl does not exist"),
        (["model.template=llama9"], "model.template: there is no template 'llama9'"),
        (
            ["hardware=t4", "model.dtype=bfloat16", "model.attention=flash_attention_2"],
            "model.dtype=bfloat16 needs compute capability 8.0; Tesla T4 has 7.5; use model.dtype=float16",
        ),
        (
            ["hardware=t4", "model.attention=flash_attention_2"],
            "flash_attention_2 needs compute capability 8.0; Tesla T4 has 7.5; use model.attention=sdpa",
        ),
        (
            ["hardware=a100_80gb", "model.attention=flash_attention_3"],
            "model.attention=flash_attention_3 needs compute capability 9.0",
        ),
        (["hardware=cpu_16gb", "hardware.device=cuda"], "hardware.device=cuda, but no NVIDIA GPU is visible"),
        (["model=falcon_7b", "export=[gguf_q8_0]"], "the base is a falcon: ship it as safetensors"),
    ],
)
def test_a_plan_refuses_what_a_run_would_refuse(
    settings: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "model=llama3_8b", *settings]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_names_what_it_could_not_check(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=llama3_8b", "hardware=rtx4090", "data.template=tool_use"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "not checked yet: the rows, since none are named (data.path=...)" in printed
    assert "not checked yet: the tokenizer of meta-llama/Meta-Llama-3-8B and its chat template" in printed
    assert "not checked yet: data.template=tool_use: no template of that name ships, so the tokenizer must" in printed


def test_a_plan_reads_the_config_of_a_model_on_the_hub_and_nothing_else(
    tiny_base: Path, work: Path, fake_hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_hub.models["org/tiny"] = tiny_base
    assert main(["plan", "model.name=org/tiny"]) == 0
    assert fake_hub.downloaded == ["config.json"]
    first = capsys.readouterr().out
    assert "org/tiny" in first
    del fake_hub.models["org/tiny"]  # now it comes from the cache
    assert main(["plan", "model.name=org/tiny"]) == 0
    assert capsys.readouterr().out == first


def test_a_plan_checks_the_template_of_a_tokenizer_that_is_here(
    tiny_base: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = served(tiny_base, work.parent / "base", "*.jinja")
    rows = write_rows(work.parent / "rows.jsonl", count=8)
    assert main(["plan", f"model.name={base}", f"data.path={rows}"]) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err
    assert main(["plan", f"model.name={base}", f"data.path={rows}", "data.template=chatml"]) == 0


def test_a_kernel_without_its_package_is_refused_before_the_model_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.errors import HardwareError
    from finetune.hardware import Machine, place
    from finetune.hardware.gpus import Gpu

    config = load(["model=llama3_8b", "data.path=rows.jsonl", "model.attention=flash_attention_2"])
    gpu = Gpu(name="A100", memory_bytes=80 * 1024**3, capability="8.0")
    machine = Machine(cores=2, ram_bytes=0, disk_free_bytes=0, gpus=(gpu,))
    start = checks.Start(config=config, machine=machine, placement=place(machine, config))
    monkeypatch.setattr(checks, "FLASH_PACKAGES", {"flash_attention_2": ("no_such_package", "nor_this_one")})
    with pytest.raises(HardwareError, match="needs one of the packages no_such_package and nor_this_one"):
        checks._check_machine(start)
