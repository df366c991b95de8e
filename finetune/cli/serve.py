"""The commands that use a finished run: ``serve`` and ``chat``."""

from __future__ import annotations

import os
from pathlib import Path

from finetune.cli.command import Command, Invocation, Option, count, names, positive_number, whole_number
from finetune.errors import EXIT_OK, ConfigError
from finetune.serve.config import ENGINES, KINDS, ServeConfig

RUN = ("run.name", "run.root")
DEFAULTS = ServeConfig()


def _serve(invocation: Invocation) -> int:
    """Serves a run until it is stopped."""
    from finetune.serve import serve

    options = invocation.options
    config = ServeConfig(
        engine=options["engine"],
        host=options["host"],
        port=options["port"],
        api_key=options["api_key"] or os.environ.get("FINETUNE_API_KEY", ""),
        max_body_mib=options["max_body_mib"],
        max_prompt_tokens=options["max_prompt_tokens"],
        max_output_tokens=options["max_output_tokens"],
        concurrent=options["concurrent"],
        waiting=options["waiting"],
        request_seconds=options["request_seconds"],
        drain_seconds=options["drain_seconds"],
        cache_mib=options["cache_mib"],
        adapters=options["adapters"],
        log_text=options["log_text"],
    )
    serve(find_target(invocation), config, models=options["models"], base=options["base"])
    return EXIT_OK


def _chat(invocation: Invocation) -> int:
    """Chats with a run in the terminal."""
    from finetune.serve import ChatSettings, chat

    options = invocation.options
    settings = ChatSettings(
        model=options["model"],
        system=options["system"],
        temperature=options["temperature"],
        max_tokens=options["max_tokens"],
        seed=options["seed"],
        compare=options["compare"],
        base=options["base"],
    )
    chat(find_target(invocation), settings)
    return EXIT_OK


def find_target(invocation: Invocation) -> Path:
    """Returns what the words name: the folder of ``run.name=x``, or a folder or file.

    Raises:
        ConfigError: They name nothing, or two things.
    """
    values, command = invocation.setting_values(), invocation.command.name
    named = [*invocation.arguments, *([values["run.name"]] if "run.name" in values else [])]
    if len(named) != 1:
        raise ConfigError(
            f"{command}: give run.name=x, or the folder of a run or export, or a .gguf file; got {named or 'none'}"
        )
    if invocation.arguments:
        return Path(invocation.arguments[0]).expanduser()
    return Path(values.get("run.root", "outputs")) / values["run.name"]


def _kinds(text: str) -> list[str]:
    chosen = names(text)
    if not chosen or not set(chosen) <= set(KINDS):
        raise ValueError(f"must be some of {', '.join(KINDS)}, between commas")
    return chosen


def _engine(text: str) -> str:
    if text not in ENGINES:
        raise ValueError(f"must be one of {', '.join(ENGINES)}")
    return text


def _kind(text: str) -> str:
    if text not in KINDS:
        raise ValueError(f"must be one of {', '.join(KINDS)}")
    return text


def _temperature(text: str) -> float:
    value = 0.0 if text == "0" else positive_number(text)
    if value > 2:
        raise ValueError("must be a number between 0 and 2")
    return value


BASE = Option("base", "folder of the base, where it is not where the run found it", "FOLDER", Path)

CHAT = Command(
    "chat", "talk to a finished run in the terminal, or answer what is piped in", _chat, arguments=("[FOLDER|GGUF]",),
    settings=RUN,
    options=(
        Option("model", "which of its models answers", "|".join(KINDS), _kind, ""),
        Option("compare", "base and tuned answer next to each other"),
        BASE,
        Option("system", "system message, instead of the training's", "TEXT"),
        Option("temperature", "0 takes the most probable token", "T", _temperature, 0.0),
        Option("max-tokens", "length of an answer at most", "N", whole_number, 512),
        Option("seed", "of sampled answers", "N", count, 0),
    ),
    example="finetune chat run.name=first --compare",
)  # fmt: skip

SERVE = Command(
    "serve", "a server with OpenAI's API for a finished run", _serve, arguments=("[FOLDER|GGUF]",), settings=RUN,
    options=(
        Option("host", "address to listen on; other than this machine's own needs a key", "HOST", str, DEFAULTS.host),
        Option("port", "0 lets the system choose", "N", count, DEFAULTS.port),
        Option("api-key", "what clients must send; better in FINETUNE_API_KEY", "KEY", str, DEFAULTS.api_key),
        Option("models", "of adapter, base, merged and gguf, between commas", "A,B", _kinds, []),
        Option(
            "engine", "of adapter, base and merged; gguf is llama.cpp's", "|".join(ENGINES), _engine, DEFAULTS.engine
        ),
        BASE,
        Option("adapters", "folder below which clients may load adapters", "FOLDER", Path),
        Option("concurrent", "answers generated at the same time", "N", whole_number, DEFAULTS.concurrent),
        Option("waiting", "answers that may wait", "N", count, DEFAULTS.waiting),
        Option("max-prompt-tokens", "longest prompt; by default the model's own limit", "N", whole_number),
        Option("max-output-tokens", "longest answer", "N", whole_number, DEFAULTS.max_output_tokens),
        Option("max-body-mib", "largest request", "N", whole_number, DEFAULTS.max_body_mib),
        Option("request-seconds", "time of one request", "S", positive_number, DEFAULTS.request_seconds),
        Option("drain-seconds", "time for running answers after SIGTERM", "S", positive_number, DEFAULTS.drain_seconds),
        Option("cache-mib", "bound of the key-value caches", "N", whole_number, DEFAULTS.cache_mib),
        Option("log-text", "log prompts and answers"),
    ),
    example="finetune serve run.name=first --port 8000",
)  # fmt: skip
