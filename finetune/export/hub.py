"""Pushes the finished exports to a model hub: by default it only lists the files, and it never uploads a secret."""

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
from finetune.export.context import ExportContext
from finetune.export.needs import without_card
from finetune.model import Base
from finetune.products import ExportResult
from finetune.run import write_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

CARD = "README.md"
TOKEN = "HF_TOKEN"
SECRETS = (TOKEN, "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")
"""Environment variables whose values must not occur in any file."""

TOKEN_PATTERN = re.compile(rb"hf_[A-Za-z0-9]{34}")
CHUNK_BYTES = 16 * 1024**2
LONGEST_SECRET = 1024
"""Bytes of overlap between chunks, so that a secret across a boundary is found."""

SHORTEST_SECRET = 8
"""A shorter value would occur in any file; no service issues such keys."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """The files to upload and their repository.

    Attributes:
        repository: ``owner/name``; may be empty if nothing is sent.
        private: Whether only the owner may see it.
        files: Local file by path in the repository.
        licence: From the card's front matter; None if it has none.
        remarks: What a user should know before the upload.
    """

    repository: str
    private: bool
    files: dict[str, Path]
    licence: str | None
    remarks: list[str]

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())


def write(context: ExportContext, name: str, settings: ExportConfig) -> ExportResult:
    """Lists the files or uploads them; records the list in ``<name>.json`` next to the exports.

    Raises:
        ExportError: There is no card, a file holds a secret, the token is missing, or the hub cannot be reached or
            refuses.
    """
    push = prepare_push(context.folder, context.exports, settings, name=name, base=context.spec.base)
    print_push(push, name=name, sent=settings.push)
    commit = send(push, token=_token(name)) if settings.push else None
    if commit:
        log("export", f"{name}: sent to {commit}")
    file = context.folder / f"{name}.json"
    record = {
        "repository": push.repository,
        "private": push.private,
        "pushed": settings.push,
        "commit": commit,
        "licence": push.licence,
        "remarks": push.remarks,
        "bytes": push.bytes,
        "files": [{"path": path, "bytes": source.stat().st_size} for path, source in push.files.items()],
    }
    write_json(file, record)
    size, digest = file.stat().st_size, file_sha256(file)
    return ExportResult(format=settings.format, path=f"export/{file.name}", bytes=size, sha256=digest)


def prepare_push(folder: Path, exports: list[ExportResult], settings: ExportConfig, *, name: str, base: Base) -> Push:
    """Lists the files of the exports, and searches each for secrets.

    Args:
        folder: The export stage's.
        exports: Descriptions of the exports in it; other files are not uploaded.
        settings: Repository and whether it is private.
        name: The export's, for messages.
        base: For remarks about its licence.

    Raises:
        ExportError: There is no card, or a file holds a secret.
    """
    for problem in without_card(name, [export.format for export in exports]):
        raise ExportError(problem)
    places = [folder / Path(export.path).name for export in exports]
    files = {path.relative_to(folder).as_posix(): path for place in places for path in _files(place)}
    leaks = [f"{path} holds {secret}" for path, file in files.items() for secret in find_secrets(file)]
    if leaks:
        raise ExportError(f"export.{name}: nothing is pushed, since {'; '.join(leaks)}; remove it and revoke that key")
    licence = read_front_matter(folder / CARD).get("license")
    remarks = list(_remarks(licence, settings, base=base))
    return Push(repository=settings.repository, private=settings.private, files=files, licence=licence, remarks=remarks)


def _files(place: Path) -> list[Path]:
    return sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]


def find_secrets(file: Path) -> Iterator[str]:
    """Yields names of secret environment variables whose value occurs in a file, and tokens of the hub."""
    values = {variable: os.environ.get(variable, "").strip().encode() for variable in SECRETS}
    wanted = {variable: value for variable, value in values.items() if len(value) >= SHORTEST_SECRET}
    seen: set[str] = set()
    with open(file, "rb") as handle:
        tail = b""
        while chunk := handle.read(CHUNK_BYTES):
            text = tail + chunk
            seen |= {f"the value of {variable}" for variable, value in wanted.items() if value in text}
            if TOKEN_PATTERN.search(text):
                seen.add("what looks like a token of the hub")
            tail = text[-LONGEST_SECRET:]
    yield from sorted(seen)


def read_front_matter(card: Path) -> dict[str, Any]:
    """Returns the front matter of a card; empty if it has none.

    Raises:
        ExportError: The card is missing, or its front matter is not YAML.
    """
    if not card.is_file():
        raise ExportError(f"{card} is missing, so nothing says what the model is; export the card again")
    match = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8"), flags=re.S)
    try:
        header = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError as error:
        raise ExportError(
            f"{card}: the text between its first --- lines is not YAML ({' '.join(str(error).split())})"
        ) from error
    return header if isinstance(header, dict) else {}


def _remarks(licence: str | None, settings: ExportConfig, *, base: Base) -> Iterator[str]:
    if not licence:
        when = "" if settings.private else ", before it is public"
        yield (
            f"the licence of {base.public_name} is not known, so whether it may be passed on is not either: "
            f"look where it was published{when}"
        )
    if base.source != "hub":
        yield (
            f"the base was a local copy: the adapter's files name it {base.public_name}, and others must give a folder "
            f"with the same weights (SHA-256 {base.sha256[:12]})"
        )
    if not settings.private:
        yield f"export.{settings.format}.private=false: everyone could see it"


def print_push(push: Push, *, name: str, sent: bool) -> None:
    """Prints every file of the upload, its total size, and its repository."""
    visibility = "private" if push.private else "public"
    licence = f"licence {push.licence}" if push.licence else "no licence stated"
    table("export", ["file", "size"], [[path, human_bytes(file.stat().st_size)] for path, file in push.files.items()])
    log("export", *[f"{name}: {remark}" for remark in push.remarks])
    verb = "are sent" if sent else "would be sent"
    remedy = f"; nothing was: set export.{name}.repository=owner/name export.{name}.push=true to send them"
    where = f"the {visibility} repository {push.repository or '(none is named yet)'}, {licence}"
    size = human_bytes(push.bytes)
    log("export", f"{name}: {len(push.files)} files, {size}, {verb} to {where}{'' if sent else remedy}")


def _token(name: str) -> str:
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        raise ExportError(
            f"export.{name}.push=true needs a token with the right to write: set {TOKEN} in the environment"
        )
    return token


def send(push: Push, *, token: str) -> str:
    """Creates the repository if it is missing, and commits all files at once; its files of other names stay.

    Returns:
        URL of the commit.

    Raises:
        ExportError: No network, no permission, a public repository instead of a private one, or files that the hub left
            out.
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
            f"{where}: HF_HUB_OFFLINE is set, so the hub is not contacted; unset it, or leave out push=true"
        ) from error
    except HfHubHTTPError as error:
        raise ExportError(f"{where}: the hub answers {_hub_message(error)}{_remedy(error)}") from error
    except HFValidationError as error:
        raise ExportError(f"{where}: {error}; set repository to owner/name") from error
    except (OSError, HTTPError) as error:
        raise ExportError(
            f"{where}: the hub at {api.endpoint} cannot be reached ({error}); check the network, then push again"
        ) from error
    except (ValueError, RuntimeError) as error:  # the hub's own checks of the card, and its upload protocols
        raise ExportError(f"{where}: the upload failed: {error}; push again, what arrived is not sent twice") from error
    if left_out:
        raise ExportError(
            f"{where}: the hub left out {', '.join(left_out)}; a .gitignore in the repository may name them"
        )
    return str(commit.commit_url)


def _check_private(api: HfApi, push: Push) -> None:
    """Checks an existing repository: it keeps its own visibility, whatever ``private`` says."""
    if push.private and api.repo_info(push.repository).private is False:
        raise ExportError(
            f"push to {push.repository}: it exists and is public, but private=true; make it private on the hub, "
            "choose another name, or set private=false"
        )


def _hub_message(error: HfHubHTTPError) -> str:
    status = getattr(error.response, "status_code", "no status")
    return f"{status}: {error.server_message}" if error.server_message else f"{status}: {str(error).splitlines()[0]}"


def _remedy(error: HfHubHTTPError) -> str:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return f"; {TOKEN} is wrong, expired, or lacks the right to write there: create one that has it"
    return "; try again later" if status is not None and status >= 500 else ""
