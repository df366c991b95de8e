"""What would be pushed is shown; a real push sends exactly that, to a small hub of our own on this machine."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.export.context import ExportContext
from finetune.export.hub import CHUNK_BYTES, find_secrets, prepare_push, write
from finetune.products import ExportResult
from finetune.quantization import QuantizationConfig
from tests.fixtures.models import model_spec

SETTINGS = {"logit_rows": 0, "loss_rows": 0, "max_logit_difference": 0.0, "max_kl": 0.0, "max_new_tokens": 1}
CARD = "---\nbase_model: org/base\nlicense: apache-2.0\n---\n\n# base, tuned\n"
TOKEN = "hf_" + "x" * 34
SEND = (
    "import sys; from pathlib import Path; from finetune.export.hub import Push, send\n"
    "from finetune.errors import ExportError\n"
    "folder = Path(sys.argv[1])\n"
    "files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob('*')) if file.is_file()}\n"
    "push = Push(repository='me/tuned', private=True, files=files, licence=None, remarks=[])\n"
    f"try: print(send(push, token='{TOKEN}'))\n"
    "except ExportError as error: sys.exit(str(error))\n"
)


@pytest.fixture
def context(tiny_base: Path, tmp_path: Path) -> ExportContext:
    """An export stage that has written an adapter and its card, beside something older that is none of its products."""
    folder = tmp_path / "export"
    (folder / "adapter").mkdir(parents=True)
    (folder / "older").mkdir()
    (folder / "older" / "model.safetensors").write_bytes(b"from an earlier run")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 100)
    for card in (folder / "README.md", folder / "adapter" / "README.md"):
        card.write_text(CARD)
    exports = [
        ExportResult(format=format, path=f"export/{file}", bytes=1, sha256="a" * 64)
        for format, file in (("adapter", "adapter"), ("card", "README.md"))
    ]
    nothing: dict[str, Any] = dict.fromkeys(field.name for field in fields(ExportContext))
    spec = model_spec(tiny_base, QuantizationConfig(method="none"))
    return ExportContext(**nothing | {"folder": folder, "spec": spec, "exports": exports, "snippets": {}})


def settings(**wishes: Any) -> ExportConfig:
    return ExportConfig(**{**SETTINGS, "format": "hub", "repository": "me/tuned", **wishes})


def test_dry_run_is_the_default_and_lists_exactly_what_would_go(context: ExportContext, capsys: Any) -> None:
    made = write(context, "hub", settings())
    record, printed = json.loads((context.folder / "hub.json").read_text()), capsys.readouterr().out
    assert [file["path"] for file in record["files"]] == [
        "adapter/README.md",
        "adapter/adapter_model.safetensors",
        "README.md",
    ]
    assert record["bytes"] == sum(file["bytes"] for file in record["files"]) == 25600 + 2 * len(CARD)
    assert (record["pushed"], record["private"], record["licence"]) == (False, True, "apache-2.0")
    assert (
        "3 files, 25.1 KiB, would be sent to the private repository me/tuned, licence apache-2.0; nothing was"
        in " ".join(printed.split())
    )
    assert (made.path, made.parity) == ("export/hub.json", None)


def test_without_a_card_nothing_goes(context: ExportContext) -> None:
    context.exports.pop()
    with pytest.raises(ExportError, match=r"needs a card.*export=\[adapter,card,hub\]"):
        write(context, "hub", settings())


@pytest.mark.parametrize("variable", ["HF_TOKEN", "WANDB_API_KEY"])
def test_file_that_holds_a_key_of_the_environment_stops_the_push(
    context: ExportContext, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "canary-0123456789")
    file = context.folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes() + b"canary-0123456789" + bytes(7))
    with pytest.raises(
        ExportError, match=rf"adapter/adapter_model.safetensors holds the value of {variable}"
    ) as caught:
        write(context, "hub", settings())
    assert "canary" not in str(caught.value)
    assert not (context.folder / "hub.json").exists()


def test_key_on_the_edge_of_two_chunks_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    file = tmp_path / "weights"
    file.write_bytes(bytes(CHUNK_BYTES - 5) + b"canary-0123456789")
    assert list(find_secrets(file)) == ["the value of WANDB_API_KEY"]


def test_token_of_someone_else_is_known_by_its_shape(context: ExportContext) -> None:
    (context.folder / "README.md").write_text(f"{CARD}\nlogin with {TOKEN}\n")
    with pytest.raises(ExportError, match=r"README.md holds what looks like a token of the hub"):
        write(context, "hub", settings())


def test_unknown_licence_and_a_base_of_this_machine_are_said(context: ExportContext) -> None:
    (context.folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# tuned\n")
    push = prepare_push(context.folder, context.exports, settings(private=False), name="hub", base=context.spec.base)
    remarks = " | ".join(push.remarks)
    assert f"the licence of {context.spec.base.name} is not known" in remarks
    assert "others must give a folder with the same weights" in remarks
    assert "everyone could see it" in remarks


def test_push_without_a_token_is_refused(context: ExportContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ExportError, match="set HF_TOKEN in the environment"):
        write(context, "hub", settings(push=True))


def test_push_where_the_hub_is_off_is_refused(context: ExportContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE is set"):
        write(context, "hub", settings(push=True))


def test_repository_must_be_owner_and_name() -> None:
    for wrong in ("tuned", "me/tuned/again", "me/ tuned"):
        assert [problem.split(";")[0] for problem in settings(repository=wrong).problems()] == [
            "export.hub.repository must be owner/name, e.g. me/my-model"
        ]
    assert not list(settings().problems())
    assert not list(settings(repository="").problems())


def test_push_must_say_where_to_and_who_sends_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    where, who = settings(repository="", push=True).problems()
    assert where.startswith("export.hub.repository must be owner/name")
    assert who == "export.hub.push=true needs a token with the right to write: set HF_TOKEN in the environment"


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as a push asks for."""

    private, status = True, 200
    received: dict[str, bytes]
    objects: dict[str, bytes]
    headers_seen: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.headers_seen.append(self.headers.get("Authorization", ""))
        if self.path.endswith("/repos/create"):
            assert json.loads(body)["visibility"] == "private"
            self.answer(
                {"url": f"http://{self.headers['Host']}/me/tuned", "id": "me/tuned"}
                if self.status == 200
                else {"error": "Invalid token"}
            )
        elif "/preupload/" in self.path:
            listed = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": listed})
        elif self.path.endswith("/objects/batch"):
            host = self.headers["Host"]
            objects = [
                {**entry, "actions": {"upload": {"href": f"http://{host}/lfs/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.received[line["value"]["path"]] = self.objects[line["value"]["oid"]]
            self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/tuned/commit/0",
                    "commitOid": "0" * 40,
                    "success": True,
                }
            )
        else:
            self.answer({"errors": [], "warnings": []})

    def do_PUT(self) -> None:
        self.objects[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            self.answer(
                [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in self.received.items()]
            )
        else:
            self.answer({"id": "me/tuned", "private": self.private, "siblings": []})

    def answer(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], str]]:
    kind = type("OneHub", (Hub,), {"received": {}, "objects": {}, "headers_seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kind, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def send_to(endpoint: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since the tests' own one is offline."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", SEND, str(folder)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_real_push_sends_every_byte_to_a_private_repository(context: ExportContext, hub: tuple[type[Hub], str]) -> None:
    kind, endpoint = hub
    done = send_to(endpoint, context.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{endpoint}/me/tuned/commit/0"
    sent = {
        file.relative_to(context.folder).as_posix(): file.read_bytes()
        for file in context.folder.rglob("*")
        if file.is_file()
    }
    assert kind.received == sent
    assert set(kind.headers_seen) >= {f"Bearer {TOKEN}"}


def test_repository_that_is_public_already_gets_nothing(context: ExportContext, hub: tuple[type[Hub], str]) -> None:
    kind, endpoint = hub
    kind.private = False
    done = send_to(endpoint, context.folder)
    assert "it exists and is public" in done.stderr
    assert not kind.received


def test_token_that_is_refused_is_one_sentence(context: ExportContext, hub: tuple[type[Hub], str]) -> None:
    kind, endpoint = hub
    kind.status = 401
    done = send_to(endpoint, context.folder)
    assert done.stderr.strip().startswith(
        "push to me/tuned: the hub answers 401: Invalid token; HF_TOKEN is wrong, expired"
    )
    assert TOKEN not in done.stderr


def test_hub_that_cannot_be_reached_is_one_sentence(context: ExportContext) -> None:
    done = send_to("http://127.0.0.1:9", context.folder)
    assert "the hub at http://127.0.0.1:9 cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
