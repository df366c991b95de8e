"""The whole line on a tiny model, as a user would start it; and bad input on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.cli import main
from finetune.config import load
from finetune.pipeline import without_push_if_gated
from tests.fixtures.overrides import overrides

PROBE = sys.modules["finetune.hardware.probe"]  # the package has a function of the same name
AUTO = ["train.micro_batch=auto", "train.checkpointing=auto"]


@pytest.mark.slow
def test_a_finished_run_resumes_with_other_threads_cache_directory_and_folder(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*overrides(tmp_path, tiny_base), *AUTO, "tracking=[]", "export=[adapter]", "preflight=off"]
    assert main([*arguments, "hardware.threads=1"]) == 0, capsys.readouterr().err
    adapter = json.loads((tmp_path / "outputs/tiny/train/manifest.json").read_text())["product"]["adapter_sha256"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "outputs").rename(elsewhere / "moved")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("FINETUNE_CACHE", str(elsewhere / "cache"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    monkeypatch.setattr(PROBE, "_ram_bytes", lambda: 2**28)
    capsys.readouterr()
    resumed = [*arguments, "run.root=moved", "run.if_exists=resume", "data.cache=other"]
    assert main(resumed) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("done before") == 6
    assert json.loads(Path("moved/tiny/report.json").read_text())["train"]["adapter_sha256"] == adapter


def test_a_run_records_what_auto_became_and_keeps_it_on_a_machine_with_other_memory(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*overrides(tmp_path, tiny_base), *AUTO, "tracking=[]", "run.until=data"]
    monkeypatch.setattr(PROBE, "_ram_bytes", lambda: 2**34)
    assert main(asked) == 0, capsys.readouterr().err
    assert "train.micro_batch=1, train.checkpointing=none: the fastest by the plan that fit" in capsys.readouterr().out
    recorded = (tmp_path / "outputs" / "tiny" / "config.yaml").read_text()
    assert "micro_batch: 1\n" in recorded
    assert "checkpointing: none\n" in recorded
    monkeypatch.setattr(PROBE, "_ram_bytes", lambda: 3 * 2**28)
    assert main([*asked, "run.if_exists=resume"]) == 0, capsys.readouterr().err
    assert "train.micro_batch=1, train.checkpointing=none: as this run began" in capsys.readouterr().out


@pytest.mark.slow
def test_trained_tokens_pass_through_the_whole_line(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        *overrides(tmp_path, tiny_base),
        "tracking=[]",
        "lora.tokens=['<|im_end|>']",
        "export=[adapter,safetensors]",
        "eval.batch_rows=2",
        "eval.artifacts=[adapter,merged]",
    ]
    assert main(asked) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "outputs" / "tiny" / "report.json").read_text())
    assert report["status"] == "complete"
    written = json.loads((tmp_path / "outputs" / "tiny" / "export" / "adapter" / "adapter_config.json").read_text())
    assert list(written["trainable_token_indices"].values()) == [[2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "rows.jsonl"),
        ("", "contains no rows"),
        ('{"messages": [\n', "rows.jsonl:1"),
        ('{"messages": [{"role": "user", "content": "hi"}]}\n', "rows.jsonl:1"),
    ],
    ids=["missing file", "empty file", "malformed JSON", "row without an answer"],
)
def test_bad_data_ends_with_2_and_says_where(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_text(content)
    asked = [
        *overrides(tmp_path, tiny_base),
        f"data.path={file}",
        "data.heldout_path=null",
        "tracking=[]",
        "run.until=data",
    ]
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_template_that_never_ends_and_a_long_line_end_with_2_and_the_limit(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    asked = [*overrides(tmp_path, tiny_base), "tracking=[]", "run.until=data", "run.if_exists=overwrite"]
    limits = ["data.limits.template_seconds=0.3", "data.limits.template_characters=100000"]
    assert main([*asked, f"data.template={template}", *limits]) == 2
    assert "needs more than 0.3 s of processor time" in capsys.readouterr().err
    rows = tmp_path / "long.jsonl"
    rows.write_text('{"prompt": "' + "a" * 2**21)
    limits = ["data.limits.line_bytes=1048576", "data.limits.compression_ratio=10"]
    assert main([*asked, f"data.path={rows}", *limits]) == 2
    assert "a line is longer than 1,048,576 bytes" in capsys.readouterr().err
    assert main([*asked, "data.limits.line_bytes=0"]) == 2
    assert "data.limits.line_bytes must be at least 1048576; got 0" in capsys.readouterr().err


def test_half_a_character_in_a_key_is_written_as_its_code(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*overrides(tmp_path, tiny_base), "data.heldout_path=null", "tracking=[]", "run.until=data"]
    rows = [{"prompt": f"q {number}", "completion": "a", "\ud800": 1} for number in range(20)]
    (tmp_path / "half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.path={tmp_path / 'half.jsonl'}", "data.format=prompt_completion", "data.duplicates=keep"]
    assert main([*asked, *data]) == 0, capsys.readouterr().err
    assert "not read: \\ud800" in capsys.readouterr().out


def test_target_that_matches_nothing_ends_with_2(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*overrides(tmp_path, tiny_base), "lora.targets=[query]", "tracking=[]"]) == 2
    assert "lora.targets: query match no linear layer. This model has down_proj" in capsys.readouterr().err


def test_planned_launches_are_refused_before_anything_is_written(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*overrides(tmp_path, tiny_base), "launch=deepspeed"]) == 2
    assert "it cannot train" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_a_model_that_misses_a_threshold_is_not_pushed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "x")
    exports = load(
        ["+experiment=quickstart", "export=[adapter,card,hub]", "export.hub.repository=me/mine", "export.hub.push=true"]
    ).export
    assert without_push_if_gated(exports, missed=[])["hub"].push
    assert not without_push_if_gated(exports, missed=["adapter.loss is 2, and at most 1 was asked for"])["hub"].push
    assert "nothing is pushed" in capsys.readouterr().out


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_the_quickstart_runs_on_the_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.dtype=float32", "eval.loss_rows=12", "eval.max_new_tokens=16"]  # bfloat16 takes minutes without AMX
    small += [f"export.{name}.max_new_tokens=8" for name in ("adapter", "safetensors", "gguf_q8_0")]
    assert main(["+experiment=quickstart", "+debug=limit", *small, f"run.root={tmp_path}"]) == 0, (
        capsys.readouterr().err
    )
    report = json.loads((tmp_path / "debug-limit" / "report.json").read_text())
    assert report["model"]["parameters"] == 134_515_008
    assert report["train"]["final_loss"] < report["train"]["first_loss"]
    dequantized = next(one for one in report["merge"]["candidates"] if one["name"] == "dequantized")
    assert dequantized["kl"] < 0.05, "bfloat16 cannot hold all of what four steps changed"
    assert all(check["passed"] for check in report["preflight"]["checks"])


@pytest.mark.slow
def test_the_wheel_brings_configuration_and_data(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)],
        check=True,
    )
    wheel = next(tmp_path.glob("finetune_qlora-*.whl"))
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
    )
    load = "from finetune.config import load; from finetune.paths import CONF; "
    load += "print(CONF, load(['+experiment=quickstart']).data.path)"
    code = f"import sys; sys.path.insert(0, {str(target)!r}); {load}"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    conf, rows = answer.stdout.split()
    assert Path(conf).is_relative_to(target)
    assert Path(rows).is_relative_to(target)
    assert Path(rows).is_file()
    assert (target / "bin" / "finetune").is_file()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_quickstart_runs_on_a_gpu_with_a_paged_optimizer(tmp_path: Path) -> None:
    assert main(["+experiment=quickstart", f"run.root={tmp_path}"]) == 0
    report = json.loads((tmp_path / "quickstart" / "report.json").read_text())
    assert report["train"]["optimizer"]["used"] == "paged_adamw_8bit"
    assert report["stages"]["train"]["peak_device_bytes"] > 0
    assert report["eval"]["artifacts"]["merged"]["metrics"]["json_valid"]["value"] > 0.9
