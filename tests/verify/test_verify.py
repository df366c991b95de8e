"""``finetune verify``: the right server passes, and each planted fault is caught by the check that names it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from finetune.cli import main
from finetune.serve.app import build_app
from finetune.serve.config import ServeConfig
from finetune.serve.engine import Token
from finetune.serve.service import Service
from finetune.verify import Target, Verified, verify
from tests.fixtures.served import listening
from tests.verify.conftest import METRIC, Models
from tests.verify.faults import SHORT_CONTEXT, Fault, Faulty, another_template, chats_only, cut_to

PASS, DIFFERS, UNASKED = "PASS", "DIFFERS", "CANNOT BE ASKED"
NAMES = ["chat template", "context", "answers", "end of turn", "greedy", "held-out loss", METRIC]


def full(engine: Any) -> FastAPI:
    """Returns this project's server."""
    return build_app(Service([engine], ServeConfig()))


def verdicts(verified: Verified) -> dict[str, str]:
    return {check.name: check.verdict for check in verified.checks}


def check(run: Path, app: FastAPI, *, artifact: str = "") -> Verified:
    with listening(app) as url:
        return verify(run, Target(url=url, model="tiny"), artifact=artifact)


def test_server_of_the_run_passes_every_check(verified_run: Path, engine: Any) -> None:
    verified = check(verified_run, full(engine))
    assert verdicts(verified) == dict.fromkeys(NAMES, PASS)
    assert verified.passed
    assert verified.artifact == "adapter"
    loss = next(check for check in verified.checks if check.name == "held-out loss")
    assert loss.figure is not None
    assert loss.figure < 1e-4


def test_server_that_only_chats_passes_what_it_can_be_asked(verified_run: Path, engine: Any) -> None:
    verified = check(verified_run, chats_only(engine, "tiny"))
    assert verdicts(verified) == {**dict.fromkeys(NAMES, PASS), "held-out loss": UNASKED}
    assert verified.passed


def _faults(models: Models, run: Path) -> dict[str, tuple[Fault, str]]:
    """Returns each fault with the check that names it."""
    longest = json.loads((run / "data" / "lengths.json").read_text())["longest"]
    return {
        "wrong template": (Fault(prompt=another_template(models.tokenizer)), "chat template"),
        "doubled BOS": (Fault(prompt=lambda prompt: [prompt[0], *prompt]), "chat template"),
        "other adapter": (Fault(model="second"), "answers"),
        "base instead of adapter": (Fault(model="base"), "answers"),
        "truncated context": (Fault(prompt=cut_to(longest - SHORT_CONTEXT)), "context"),
        "temperature not 0": (Fault(temperature=1.0), "greedy"),
    }


FAULTS = (
    "wrong template", "doubled BOS", "other adapter", "base instead of adapter", "truncated context",
    "temperature not 0",
)  # fmt: skip


@pytest.mark.parametrize("server", ["full", "chats_only"])
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name: str, server: str, verified_run: Path, models: Models, engine: Any) -> None:
    fault, named = _faults(models, verified_run)[name]
    faulty = Faulty(engine, fault)
    verified = check(verified_run, full(faulty) if server == "full" else chats_only(faulty, "tiny"))
    assert verdicts(verified)[named] == DIFFERS
    assert not verified.passed


@pytest.mark.parametrize("server", ["full", "chats_only"])
def test_missing_end_token_is_caught(server: str, verified_run: Path, models: Models) -> None:
    endless = models.engine(ends=[])
    try:
        verified = check(verified_run, full(endless) if server == "full" else chats_only(endless, "tiny"))
    finally:
        endless.close()
    assert verdicts(verified)["end of turn"] == DIFFERS
    assert not verified.passed


@pytest.mark.parametrize("fault", [Fault(model="second"), Fault(model="base")], ids=["other adapter", "base"])
def test_other_weights_are_seen_in_the_loss(fault: Fault, verified_run: Path, engine: Any) -> None:
    assert verdicts(check(verified_run, full(Faulty(engine, fault))))["held-out loss"] == DIFFERS


@pytest.mark.parametrize("server", [full, lambda engine: chats_only(engine, "tiny")], ids=["full", "chats_only"])
def test_4_bit_weights_are_caught_where_16_bit_ones_were_measured(
    server: Callable[[Any], FastAPI], verified_run: Path, engine: Any
) -> None:
    """The run's merged model is dense; the server computes with the 4-bit base and the same adapter."""
    right = check(verified_run, server(Faulty(engine, Fault(model="merged"))), artifact="merged")
    assert right.passed
    wrong = check(verified_run, server(engine), artifact="merged")
    assert not wrong.passed


def test_rows_that_the_server_cannot_score_are_left_out_and_counted(verified_run: Path, engine: Any) -> None:
    class Unscored(Faulty):
        def score(self, model: str, tokens: Sequence[int], *, top: int) -> list[Token]:
            self._count += 1
            scored = super().score(model, tokens, top=top)
            return scored if self._count > 2 else [replace(token, logprob=None) for token in scored[:-1]] + scored[-1:]

    verified = check(verified_run, full(Unscored(engine, Fault())))
    loss = next(check for check in verified.checks if check.name == "held-out loss")
    assert loss.verdict == PASS
    assert "on 8 rows" in loss.detail
    assert "; 2 rows are left out" in loss.detail


def test_command_prints_the_table_and_fails_where_it_differs(
    verified_run: Path, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["verify", f"run.root={verified_run.parent}", "run.name=tiny", "--rows", "4"]
    with listening(full(engine)) as url:
        assert main([*words, f"url={url}/v1", "model=tiny"]) == 0
        printed = capsys.readouterr().out
        assert "PASS             chat template: 8 chats have the token ids of training" in printed
        assert "tiny is what was trained, as far as it can be asked" in printed
        assert main([*words, f"url={url}", "model=second", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["passed"], document["artifact"]) == (False, "adapter")
    assert "answers" in {check["name"] for check in document["checks"] if check["verdict"] == DIFFERS}


def test_models_are_compared_with_the_artifact_of_their_name(
    verified_run: Path, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["verify", f"run.root={verified_run.parent}", "run.name=tiny", "--rows", "2", "--json"]
    with listening(full(engine)) as url:
        for model, artifact in (("base", "base_quantized"), ("merged", "merged")):
            assert main([*words, f"url={url}", f"model={model}"]) == 0
            assert json.loads(capsys.readouterr().out)["artifact"] == artifact


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.name=tiny"], "verify needs url=..."),
        (["run.name=tiny", "url=ftp://localhost"], "url must begin with http:// or https://"),
        (["run.name=missing", "url=URL"], "there is no run in"),
        (["run.name=tiny", "url=127.0.0.1:9"], "nothing answers there"),
        (["run.name=tiny", "url=URL", "model=tine"], "did you mean model=tiny?"),
        (["run.name=tiny", "url=URL", "model=tiny", "--artifact", "best"], "measured adapter, base_quantized, merged"),
        (["run.name=tiny", "url=OTHER"], "is not an OpenAI-compatible server"),
        (["run.name=tiny", "url=URL", "--agreement-bound", "2"], "must be between 0 and 1"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    words: list[str], message: str, verified_run: Path, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(full(engine)) as url, listening(FastAPI(openapi_url=None)) as other:
        words = [word.replace("URL", url).replace("OTHER", other) for word in words]
        assert main(["verify", f"run.root={verified_run.parent}", *words]) == 2
    assert message in capsys.readouterr().err


def test_wrong_key_is_named(verified_run: Path, engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", f"run.root={verified_run.parent}", "run.name=tiny", "--rows", "1"]
    with listening(build_app(Service([engine], ServeConfig(api_key="secret")))) as url:
        assert main([*words, f"url={url}", "model=tiny", "--api-key", "wrong"]) == 2
        assert "the API key is wrong; give --api-key" in capsys.readouterr().err
        assert main([*words, f"url={url}", "model=tiny", "--api-key", "secret"]) == 0


def test_server_that_fails_differs(verified_run: Path) -> None:
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "tiny"}]}

    verified = check(verified_run, app)
    assert not verified.passed
    assert verdicts(verified)["held-out rows"] == DIFFERS
