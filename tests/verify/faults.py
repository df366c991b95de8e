"""The faults that deployments have, each planted into a real engine; and a server that answers chats only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from finetune.serve.engine import Finish, Generation, Message, Sampling, Token, stream

SHORT_CONTEXT = 20
"""Tokens that are missing from a longest chat in a context that is cut."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong: a change of the prompt's tokens, another model, other sampling."""

    prompt: Callable[[list[int]], list[int]] = list
    model: str = ""
    temperature: float | None = None


class Faulty:
    """An engine with a fault; everything else is the engine's own."""

    def __init__(self, engine: Any, fault: Fault) -> None:
        self._engine, self._fault = engine, fault
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def render(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        return self._fault.prompt(self._engine.render(messages, tools))

    def score(self, model: str, tokens: Sequence[int], *, top: int) -> list[Token]:
        return list(self._engine.score(self._fault.model or model, tokens, top=top))

    def start(self, generation: Generation) -> None:
        sampling: Sampling = generation.sampling
        if self._fault.temperature is not None:
            self._count += 1
            sampling = replace(sampling, temperature=self._fault.temperature, seed=self._count)
        model = self._fault.model or generation.model
        self._engine.start(Generation(model, generation.prompt, sampling, on_event=generation.on_event))


def another_template(tokenizer: Any) -> Callable[[list[int]], list[int]]:
    """Returns a prompt as ``### user`` writes it, where training wrote ChatML."""

    def change(prompt: list[int]) -> list[int]:
        text = tokenizer.decode(prompt).replace("<|im_start|>", "### ").replace("<|im_end|>", "")
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    return change


def cut_to(tokens: int) -> Callable[[list[int]], list[int]]:
    """Returns the last tokens of a prompt, as servers with a short context do."""
    return lambda prompt: prompt[-tokens:]


def chats_only(engine: Any, model: str) -> FastAPI:
    """Returns a server that gives no token ids, no log-probabilities and no completions, as Ollama's chat."""
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model, "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> JSONResponse:
        body: Mapping[str, Any] = await request.json()
        prompt = engine.render(body["messages"])
        sampling = Sampling(max_tokens=body["max_tokens"], temperature=body["temperature"])
        text, finish = "", Finish("error", 0)
        for event in stream(engine, model, prompt, sampling):
            text += event.text
            finish = event if isinstance(event, Finish) else finish
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish.reason}
        return JSONResponse({"choices": [choice], "usage": {"prompt_tokens": len(prompt)}})

    return app
