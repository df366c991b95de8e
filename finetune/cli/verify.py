"""The command ``verify``: whether a server gives what was trained."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from finetune.cli.command import Command, Invocation, Option, positive_number, whole_number
from finetune.errors import EXIT_FAILURE, EXIT_OK, ConfigError

SETTINGS = ("run.name", "run.root", "url", "model")


def _verify(invocation: Invocation) -> int:
    """Verifies a server; fails where it differs."""
    values, options = invocation.setting_values(), invocation.options
    missing = [f"{name}=..." for name in ("run.name", "url") if not values.get(name)]
    if missing:
        raise ConfigError(f"verify needs {' and '.join(missing)}, e.g. {invocation.command.example}")
    url = values["url"] if "://" in values["url"] else f"http://{values['url']}"
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"verify: url must begin with http:// or https://; got {url}")
    from finetune.verify import Bounds, Target, verify
    from finetune.verify.run import show

    target = Target(
        url=url,
        model=values.get("model", ""),
        key=options["api_key"] or os.environ.get("FINETUNE_API_KEY", ""),
        seconds=options["seconds"],
    )
    bounds = Bounds(loss=options["loss_bound"], agreement=options["agreement_bound"])
    folder = Path(values.get("run.root", "outputs")) / values["run.name"]
    with redirect_stdout(sys.stderr if options["json"] else sys.stdout):
        verified = verify(folder, target, artifact=options["artifact"], rows=options["rows"], bounds=bounds)
    if options["json"]:
        from finetune.jsonable import to_jsonable

        sys.stdout.write(json.dumps(to_jsonable(verified), indent=2, ensure_ascii=False) + "\n")
    else:
        show(verified)
    return EXIT_OK if verified.passed else EXIT_FAILURE


def _share(text: str) -> float:
    value = 0.0 if text == "0" else positive_number(text)
    if value > 1:
        raise ValueError("must be between 0 and 1")
    return value


VERIFY = Command(
    "verify", "does a server give what was trained? url=http://... model=...", _verify, settings=SETTINGS,
    options=(
        Option("artifact", "what it should be: adapter, merged, base, base_quantized or an export", "NAME"),
        Option("rows", "held-out rows to ask", "N", whole_number, 32),
        Option("loss-bound", "held-out loss may differ by, in nats per token", "NATS", positive_number, 0.02),
        Option("agreement-bound", "how much of the answers must agree", "SHARE", _share, 0.8),
        Option("seconds", "longest wait for one answer", "S", positive_number, 600.0),
        Option("api-key", "of the server; better in FINETUNE_API_KEY", "KEY"),
        Option("json", "print one JSON document instead"),
    ),
    example="finetune verify run.name=first url=http://127.0.0.1:8000 model=first",
)  # fmt: skip
