"""The requests of OpenAI's API, as far as they can be kept; anything else is refused, never ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.serve.errors import ApiError

MOST_CHOICES, MOST_LOGPROBS, MOST_STOPS = 16, 20, 4
"""Limits of OpenAI's API, but for the number of choices: a choice."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
    "parallel_tool_calls": (None, True),
    "store": (None, False),
}
"""Parameters that clients send with a value that changes nothing; other values are refused."""

INFORMATIVE = ("user", "metadata", "safety_identifier", "service_tier")
"""Parameters that say something about the client and change no answer."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object"]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, Any]:
        """Returns the message as a chat template takes it: text as one string, calls with decoded arguments."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        for name in ("name", "tool_calls", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        return message


class Request(BaseModel):
    """What both kinds of completion take. Sampling is greedy where a request sets no temperature."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    def stops(self) -> list[str]:
        """Returns the strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(Request):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None


class LoadAdapterRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lora_name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    lora_path: str


class UnloadAdapterRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lora_name: str


Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(kind: type[Parsed], content: Any) -> Parsed:
    """Reads a request's JSON.

    Raises:
        ApiError: With status 400, naming the first parameter that is wrong.
    """
    if not isinstance(content, dict):
        raise ApiError(400, f"the request's body must be a JSON object; got {type(content).__name__}")
    content = {name: value for name, value in content.items() if name not in INFORMATIVE}
    for name, neutral in NEUTRAL.items():
        if name in content and content.pop(name) not in neutral:
            raise ApiError(400, f"{name} is not supported; leave it out", parameter=name, code="unsupported_parameter")
    try:
        request = kind.model_validate(content)
    except ValidationError as error:
        raise _explained(error) from error
    _check(request)
    return request


def _explained(error: ValidationError) -> ApiError:
    problem = error.errors(include_url=False)[0]
    place = [str(step) for step in problem["loc"]]
    name = place[0] if place else None
    if problem["type"] == "extra_forbidden":
        where = ".".join(place)
        return ApiError(400, f"{where} is not supported; leave it out", parameter=name, code="unsupported_parameter")
    given = problem.get("input")
    shown = f"; got {given!r}" if isinstance(given, bool | int | float) else ""
    return ApiError(400, f"{'.'.join(place)}: {problem['msg']}{shown}", parameter=name, code="invalid_value")


def _check(request: BaseModel) -> None:
    """Refuses what the types do not: too many stop strings, empty ones, and options without what they belong to."""
    if not isinstance(request, Request):
        return
    stops = request.stops()
    if len(stops) > MOST_STOPS or "" in stops:
        raise ApiError(400, f"stop: at most {MOST_STOPS} strings, none of them empty", parameter="stop")
    if request.stream_options and not request.stream:
        raise ApiError(400, "stream_options needs stream=true", parameter="stream_options")
    if not isinstance(request, ChatRequest):
        return
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", parameter="top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(400, "give max_tokens or max_completion_tokens, not both", parameter="max_tokens")


def prompts(request: CompletionRequest, tokenize: Any) -> list[list[int]]:
    """Returns the token ids of each prompt of a completion.

    Raises:
        ApiError: There is none.
    """
    given: Sequence[Any] = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if given and isinstance(given[0], int):
        given = [given]
    tokens = [tokenize(item) if isinstance(item, str) else list(item) for item in given]
    if not tokens or not all(tokens):
        raise ApiError(400, "prompt: is empty; give a text or token ids", parameter="prompt")
    return tokens
