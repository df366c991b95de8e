import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import ConfigError, DataError
from finetune.report import report

NUMBER = (int, float)
CONTRACT: dict[str, Any] = {
    "schema": int,
    "status": str,
    "run": str,
    "seed": int,
    "data": {
        "rows": {"in": int, "kept": int, "dropped": dict, "truncated": int, "duplicate": int},
        "tokens": int,
        "trained_tokens": int,
        "packed_rows": int,
    },
    "model": {"name": str, "parameters": int, "trainable_parameters": int, "quantization": dict, "bytes": int},
    "train": {
        "steps": int,
        "seconds": NUMBER,
        "tokens_per_second": NUMBER,
        "trained_tokens_per_second": NUMBER,
        "first_loss": NUMBER,
        "final_loss": NUMBER,
        "optimizer": {"asked": str, "used": str, "why": str},
    },
    "eval": {"artifacts": {"base": dict, "base_quantized": dict, "adapter": dict, "merged": dict}},
    "merge": {
        "candidates": [{"name": str, "kl": NUMBER, "top1_agreement": NUMBER, "perplexity": NUMBER}],
        "chosen": str,
    },
    "artifacts": [{"title": str, "kept": bool, "loss_rows": int, "loss": NUMBER, "answer_rows": int, "metrics": dict}],
    "export": [{"format": str, "path": str, "bytes": int, "sha256": str, "parity": dict}],
    "use": [{"title": str, "command": str}],
    "stages": {
        stage: {"seconds": NUMBER, "peak_rss_bytes": int, "peak_device_bytes": int}
        for stage in ("data", "train", "merge", "eval")
    },
}


def _check(value: Any, contract: Any, where: str = "report") -> None:
    if isinstance(contract, dict):
        for key, inner in contract.items():
            assert key in value, f"{where}.{key} is missing"
            _check(value[key], inner, f"{where}.{key}")
    elif isinstance(contract, list):
        assert value, f"{where} is empty"
        for item in value:
            _check(item, contract[0], where)
    else:
        assert isinstance(value, contract), f"{where} is {value!r}"


def _read(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def test_report_json_keeps_its_contract(run: Path) -> None:
    files = report(run)
    content = json.loads(files.json.read_text())
    _check(content, CONTRACT)
    assert (content["schema"], content["status"], content["missing"]) == (1, "complete", [])


def test_headline_compares_the_base_with_what_was_shipped(run: Path) -> None:
    report(run)
    headline = _read(run)["headline"]
    assert (headline["metric"], headline["artifact"], headline["verdict"]) == ("json_exact", "merged", "better")
    assert (headline["before"]["value"], headline["after"]["value"]) == (0.0, 0.638)


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.3, "better"), (-0.3, -0.1, "worse"), (-0.1, 0.3, "unclear")]
)
def test_verdict_follows_the_interval_of_the_paired_difference(
    run: Path, low: float, high: float, verdict: str
) -> None:
    file = run / "eval" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["product"]["changes"]["total"]["json_exact"] |= {"low": low, "high": high}
    file.write_text(json.dumps(manifest))
    report(run)
    assert _read(run)["headline"]["verdict"] == verdict


def test_without_a_task_metric_lower_perplexity_is_better(run: Path) -> None:
    file = run / "eval" / "manifest.json"
    manifest = json.loads(file.read_text())
    for artifact in manifest["product"]["artifacts"].values():
        artifact["metrics"] = {}
    file.write_text(json.dumps(manifest))
    report(run)
    headline = _read(run)["headline"]
    assert (headline["metric"], headline["higher_is_better"], headline["verdict"]) == ("perplexity", False, "better")


@pytest.mark.parametrize("finished", [0, 1, 2, 3, 4, 5, 6])
def test_a_run_that_stopped_early_names_what_is_missing(
    run: Path, finished: int, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = ["data", "model", "preflight", "train", "merge", "eval", "export"]
    for stage in stages[finished:]:
        shutil.rmtree(run / stage)
    files = report(run)
    content = _read(run)
    assert content["status"] == files.status == "partial"
    assert content["missing"] == [stage for stage in stages[finished:] if stage != "model"]
    assert "stopped early" in files.html.read_text()
    assert "did not finish" in capsys.readouterr().out


def test_stage_that_did_not_run_is_null_with_its_key_there(run: Path) -> None:
    shutil.rmtree(run / "merge")
    report(run)
    assert _read(run)["merge"] is None


def test_status_of_the_caller_is_kept(run: Path) -> None:
    assert report(run, status="failed").status == "failed"


def test_html_asks_the_network_for_nothing(run: Path) -> None:
    html = report(run).html.read_text()
    assert not re.search(r"""src\s*=|url\(|@import|<link|fetch\(|XMLHttpRequest""", html)
    assert "http:" not in html
    assert "https:" not in html


def test_page_runs_its_own_script_and_no_other(run: Path) -> None:
    html = report(run).html.read_text()
    (script,) = re.findall("(?s)<script>(.*?)</script>", html)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


def test_links_lead_to_parts_of_the_page_and_to_files_of_the_run(run: Path) -> None:
    (run / "data" / "preview.html").touch()
    html = report(run).html.read_text()
    links = re.findall(r"""href="([^"]*)\"""", html)
    parts = {link.removeprefix("#") for link in links if link.startswith("#")}
    assert parts == set(re.findall(r'<section id="(\w+)"', html))
    files = {link for link in links if not link.startswith("#")}
    written = {"report.json", "config.yaml", "data/preview.html", "train/metrics.jsonl", "eval/samples.jsonl"}
    assert files == written | {export["path"] for export in _read(run)["export"]}


def test_examples_of_the_data_are_shown_with_their_marks(run: Path) -> None:
    assert "What is trained on" not in report(run).html.read_text()
    texts = {"What? ": False, "It <b>": True}
    stretches = [{"text": text, "is_trained": is_trained, "is_end": False} for text, is_trained in texts.items()]
    example = {"place": "rows.jsonl:1", "facts": ["3 tokens"], "stretches": stretches, "more": 0, "rejected": None}
    (run / "data" / "examples.json").write_text(json.dumps([{**example, "is_undesirable": False}]))
    assert "<pre>What? <mark>It &lt;b&gt;</mark></pre>" in " ".join(report(run).html.read_text().split())


def test_every_answer_is_on_the_page_and_can_be_filtered(run: Path) -> None:
    html = report(run).html.read_text()
    assert "All 20 held-out" in html
    assert (html.count('<tr class="wrong">'), html.count('<tr class="right">')) == (6, 14)
    assert "not fully right, 6" in html


def test_a_page_of_many_answers_says_how_many_are_left_out(run: Path) -> None:
    file = run / "eval" / "samples.jsonl"
    file.write_text(file.read_text() * 30)
    html = " ".join(report(run).html.read_text().split())
    assert "The first 500 of the 600 held-out rows" in html
    assert html.count('<tr class="wrong">') + html.count('<tr class="right">') == 500


def test_contents_name_no_part_that_is_missing(run: Path) -> None:
    shutil.rmtree(run / "merge")
    html = report(run).html.read_text()
    assert 'href="#merge"' not in html
    assert 'href="#training"' in html


def test_configuration_shows_what_differs_from_the_defaults(run: Path) -> None:
    html = " ".join(report(run).html.read_text().split())
    assert html.index('<section id="training">') < html.index('<section id="configuration">') < html.index('"scores"')
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["lora"] = {"rank": 17, "variant": "lora"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    html = " ".join(report(run).html.read_text().split())
    assert "<tr><td>lora.rank</td><td>17</td><td>16</td></tr>" in html
    assert "<td>lora.variant</td>" not in html


def test_text_of_a_run_cannot_become_markup(run: Path) -> None:
    html = report(run).html.read_text()
    assert "<b>early</b>" not in html
    assert "&lt;b&gt;early&lt;/b&gt;" in html


@pytest.mark.parametrize(
    "heading",
    [
        "Did it learn the task?",
        "Answers, before and after",
        "Training",
        "Data",
        "Memory and time",
        "Merge",
        "Exports",
        "Use this model",
        "Configuration",
        "Checked before training",
        "Decided automatically",
        "Files",
        "How to reproduce it",
    ],
)
def test_page_has_every_part(run: Path, heading: str) -> None:
    assert f"<h2>{heading}</h2>" in report(run).html.read_text()


def test_markdown_states_the_headline_and_the_merge(run: Path) -> None:
    text = report(run).markdown.read_text()
    assert "**Whole answer right: 0.0 % → 63.8 %** (95 % interval 56.8 to 70.8 %)" in text
    assert "| **dequantized** | 0.00008 |" in text


def test_last_lines_of_a_run_and_its_report_are_the_commands_that_use_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = report(run)
    commands = [use["command"] for use in _read(run)["use"]]
    assert f"finetune chat run.name={run.name} run.root={run.parent}" in commands
    last = capsys.readouterr().out.splitlines()[-len(commands) :]
    assert [line.split(maxsplit=1)[0] for line in last] == ["use"] * len(commands)
    for line, command in zip(last, commands, strict=True):
        assert line.endswith(f" {command}")
        assert command in files.markdown.read_text()


def test_one_table_has_every_artifact_on_the_same_rows(run: Path) -> None:
    files = report(run)
    lines = json.loads(files.json.read_text())["artifacts"]
    assert [line["title"] for line in lines if line["kept"]] == ["Merged: dequantized + adapter"]
    text = files.markdown.read_text()
    assert "The same 160 held-out rows went through every artifact" in text
    assert "Fewer: Export gguf: 20 rows for the answers." in text
    for row in (
        "| Quantized base + adapter | 0.1210 [0.1149, 0.1270] | 1.129 "
        "| -2.2000 [-2.2500, -2.1500] from base, quantized |",
        "| Merged: dequantized + adapter (kept) | 0.1210 [0.1149, 0.1270] | 1.129 "
        "| +0.0000 [-0.0010, +0.0010] from adapter | 0.981",
        "| Merged: original + adapter | 0.1180 | 1.125 | – | not asked |",
        "| Export adapter | 0.1210 [0.1149, 0.1270] | 1.129 | +0.0000 [-0.0010, +0.0010] from adapter | not asked |",
        "| Export gguf | 0.1210 [0.1149, 0.1270] | 1.129 "
        "| +0.0000 [-0.0010, +0.0010] from merged | 0.900 [0.870, 0.930] |",
    ):
        assert row in text
        assert row.split(" | ")[1].replace(" [", "<br>[") in files.html.read_text()
    assert "compared with merged model on the same 20 rows: Valid JSON -0.0500 [-0.1000, +0.0000] from 0.950" in text


def test_decisions_come_with_their_reasons(run: Path) -> None:
    report(run)
    decisions = _read(run)["decisions"]
    assert "device cpu: no GPU that this run can use" in decisions
    assert any(decision.startswith("optimizer adamw_8bit: paged_adamw_8bit was asked for") for decision in decisions)


def test_line_cut_short_by_a_killed_process_is_left_out(run: Path) -> None:
    with open(run / "memory.jsonl", "a") as handle:
        handle.write('{"time": 12')
    assert report(run).status == "complete"


def test_damaged_line_is_named_with_its_number(run: Path) -> None:
    file = run / "train" / "metrics.jsonl"
    file.write_text("broken\n" + file.read_text())
    with pytest.raises(DataError, match=r"metrics\.jsonl:1 is not JSON"):
        report(run)


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run"):
        report(tmp_path / "none")
    with pytest.raises(ConfigError, match="nothing to report"):
        report(tmp_path)


def test_report_is_the_same_bytes_when_written_again(run: Path) -> None:
    files = report(run)
    before = [file.read_bytes() for file in (files.json, files.markdown, files.html)]
    report(run)
    assert before == [file.read_bytes() for file in (files.json, files.markdown, files.html)]
