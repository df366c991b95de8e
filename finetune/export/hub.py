"""A push of the finished exports to a model hub: by default only a list of what would go, and never a secret."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finetune.cache import file_sha256
from finetune.console import human_bytes, log, table
from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.export.context import Work
from finetune.export.needs import without_card
from finetune.model import Base
from finetune.run import write_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
TOKEN = "HF_TOKEN"
SECRETS = (TOKEN, "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")
"""Environment variables whose values must not stand in any file."""

TOKEN_SHAPE = re.compile(rb"hf_[A-Za-z0-9]{34}")
CHUNK_BYTES = 16 * 1024**2
LONGEST_SECRET = 1024
"""Bytes that are looked at twice, so that a secret on the edge of two chunks is seen."""

SHORTEST_SECRET = 8
"""A shorter value would be found in any file; no service gives such keys."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """What goes where.

    Attributes:
        repository: ``owner/name``; may be empty while nothing is sent.
        private: Whether only the owner may see it.
        files: By path in the repository, where it lies.
        licence: As the card's header states it; None where it states none.
        remarks: What a reader should know before it goes.
    """

    repository: str
    private: bool
    files: dict[str, Path]
    licence: str | None
    remarks: list[str]

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())


def write(work: Work, name: str, settings: ExportConfig) -> dict[str, Any]:
    """Says what would go, or sends it; ``<name>.json`` beside the exports keeps the list.

    Raises:
        ExportError: There is no card, a file holds a secret, the token is missing, or the hub cannot be reached or refuses.
    """
    push = prepare(work.folder, work.exports, settings, name=name, base=work.spec.base)
    show(push, name=name, sent=settings.push)
    record = {
        "repository": push.repository, "private": push.private, "pushed": False, "commit": None, "licence": push.licence,
        "remarks": push.remarks, "bytes": push.bytes,
        "files": [{"path": path, "bytes": file.stat().st_size} for path, file in push.files.items()],
    }  # fmt: skip
    if settings.push:
        record |= {"pushed": True, "commit": send(push, token=_token(name))}
        log("export", f"{name}: sent to {record['commit']}")
    file = work.folder / f"{name}.json"
    write_json(file, record)
    return {
        "format": settings.format, "path": f"export/{file.name}", "bytes": file.stat().st_size, "sha256": file_sha256(file), "parity": {},
    }  # fmt: skip


def prepare(folder: Path, exports: list[dict[str, Any]], settings: ExportConfig, *, name: str, base: Base) -> Push:
    """Lists the files of the exports that were made, and looks through each.

    Args:
        folder: The export stage's.
        exports: Descriptions of what lies in it; nothing else goes.
        settings: Repository and whether it is private.
        name: The export's, for messages.
        base: For what is to be said about its licence.

    Raises:
        ExportError: There is no card, or a file holds a secret.
    """
    for problem in without_card(name, [one["format"] for one in exports]):
        raise ExportError(problem)
    files = {
        path.relative_to(folder).as_posix(): path for one in exports for path in _files(folder / Path(one["path"]).name)
    }
    leaks = [f"{path} holds {what}" for path, file in files.items() for what in found_secrets(file)]
    if leaks:
        raise ExportError(
            f"export.{name}: nothing is pushed, since {'; '.join(leaks)}; take it out and make that key invalid"
        )
    header = read_header(folder / CARD)
    return Push(
        repository=settings.repository, private=settings.private, files=files, licence=header.get("license"),
        remarks=list(_remarks(header, settings, base=base)),
    )  # fmt: skip


def _files(place: Path) -> list[Path]:
    return sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]


def found_secrets(file: Path) -> Iterator[str]:
    """Names of the environment's secrets whose value stands in a file, and tokens of the hub by their shape."""
    values = {variable: os.environ.get(variable, "").strip().encode() for variable in SECRETS}
    wanted = {variable: value for variable, value in values.items() if len(value) >= SHORTEST_SECRET}
    seen: set[str] = set()
    with open(file, "rb") as handle:
        tail = b""
        while chunk := handle.read(CHUNK_BYTES):
            text = tail + chunk
            seen |= {f"the value of {variable}" for variable, value in wanted.items() if value in text}
            if TOKEN_SHAPE.search(text):
                seen.add("what looks like a token of the hub")
            tail = text[-LONGEST_SECRET:]
    yield from sorted(seen)


def read_header(card: Path) -> dict[str, Any]:
    """The front matter of a card; empty where it has none.

    Raises:
        ExportError: The card is missing, or its front matter is no YAML.
    """
    if not card.is_file():
        raise ExportError(f"{card} is missing, so there is nothing to say what the model is; export the card again")
    found = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8"), flags=re.S)
    try:
        header = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError as error:
        raise ExportError(
            f"{card}: what stands between its first --- lines is no YAML ({' '.join(str(error).split())})"
        ) from error
    return header if isinstance(header, dict) else {}


def _remarks(header: dict[str, Any], settings: ExportConfig, *, base: Base) -> Iterator[str]:
    if not header.get("license"):
        told = "" if settings.private else ", before it is public"
        yield f"the licence of {base.name} is not known, so whether it may be passed on is not either: look where it was published{told}"
    if base.source != "hub":
        yield f"the base was {base.name} on this machine: the adapter's files name it so, and others must put their own path there"
    if not settings.private:
        yield f"export.{settings.format}.private=false: everyone could see it"


def show(push: Push, *, name: str, sent: bool) -> None:
    """Prints every file that goes, the whole size, and where to."""
    kind = "private" if push.private else "public"
    licence = f"licence {push.licence}" if push.licence else "no licence stated"
    table("export", ["file", "size"], [[path, human_bytes(file.stat().st_size)] for path, file in push.files.items()])
    log("export", *[f"{name}: {remark}" for remark in push.remarks])
    verb = "are sent" if sent else "would be sent"
    how = "" if sent else f"; nothing was: say export.{name}.repository=owner/name export.{name}.push=true to send them"
    where = f"the {kind} repository {push.repository or '(none is named yet)'}, {licence}"
    log("export", f"{name}: {len(push.files)} files, {human_bytes(push.bytes)}, {verb} to {where}{how}")


def _token(name: str) -> str:
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        raise ExportError(
            f"export.{name}.push=true needs a token with the right to write: set {TOKEN} in the environment"
        )
    return token


def send(push: Push, *, token: str) -> str:
    """Makes the repository where it is not there and commits all files at once; what it had of other names stays.

    Returns:
        Where the commit can be looked at.

    Raises:
        ExportError: No network, no right, a public repository where a private one was asked for, or files that the hub left out.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    api = HfApi(token=token)
    where = f"push to {push.repository}"
    try:
        api.create_repo(push.repository, private=push.private, exist_ok=True)
        _check_private(api, push)
        additions = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in push.files.items()]
        commit = api.create_commit(push.repository, additions, commit_message="Exports of a finetune run")
        left_out = sorted(set(push.files) - set(api.list_repo_files(push.repository)))
    except OfflineModeIsEnabled as error:
        raise ExportError(
            f"{where}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or leave out push=true"
        ) from error
    except HfHubHTTPError as error:
        raise ExportError(f"{where}: the hub says {_said(error)}{_remedy(error)}") from error
    except HFValidationError as error:
        raise ExportError(f"{where}: {error}; set repository to owner/name") from error
    except (OSError, HTTPError) as error:
        raise ExportError(
            f"{where}: the hub at {api.endpoint} cannot be reached ({error}); look at the network, then push again"
        ) from error
    except (ValueError, RuntimeError) as error:  # the hub's own checks of the card, and its upload protocols
        raise ExportError(f"{where}: the upload failed: {error}; push again, what arrived is not sent twice") from error
    if left_out:
        raise ExportError(
            f"{where}: the hub left out {', '.join(left_out)}; a .gitignore in the repository may name them"
        )
    return str(commit.commit_url)


def _check_private(api: HfApi, push: Push) -> None:
    """A repository that was there before keeps its own visibility, whatever was asked for."""
    if push.private and api.repo_info(push.repository).private is False:
        raise ExportError(
            f"push to {push.repository}: it is there already and is public, and a private one was asked for; make it private on the hub, "
            "choose another name, or say private=false"
        )


def _said(error: Any) -> str:
    status = getattr(error.response, "status_code", "no status")
    return f"{status}: {error.server_message}" if error.server_message else f"{status}: {str(error).splitlines()[0]}"


def _remedy(error: Any) -> str:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return f"; {TOKEN} is wrong, too old, or has no right to write there: make one that has"
    return "; try again later" if status is not None and status >= 500 else ""
