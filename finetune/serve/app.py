"""The HTTP server: OpenAI's routes, health and figures."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from finetune.console import log
from finetune.serve.adapters import AdapterLoader
from finetune.serve.answers import Answer, Piece
from finetune.serve.engine import RequestRefused
from finetune.serve.errors import ApiError
from finetune.serve.http import EventStream, Guard, event, in_time, read_json, timed_out, unless_disconnected
from finetune.serve.record import CLIENT_LEFT, Record
from finetune.serve.requests import (
    ChatRequest,
    CompletionRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
    parse,
    prompts,
)
from finetune.serve.responses import ResponseHead, usage
from finetune.serve.service import Service, merged, wholes
from finetune.serve.writers import ChatWriter, CompletionWriter, Writer

AnyRequest = ChatRequest | CompletionRequest


def build_app(service: Service, adapters: AdapterLoader | None = None) -> FastAPI:
    """Returns the application.

    Args:
        service: The models.
        adapters: Loads adapters for clients; None refuses.
    """
    app = FastAPI(title="finetune", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, config=service.config, errors=service.metrics.errors)
    routes = Routes(service, adapters)
    for path, method, endpoint in (
        ("/v1/chat/completions", "POST", routes.chat),
        ("/v1/completions", "POST", routes.complete),
        ("/v1/models", "GET", routes.list_models),
        ("/v1/models/{name:path}", "GET", routes.show_model),
        ("/v1/load_lora_adapter", "POST", routes.load_adapter),
        ("/v1/unload_lora_adapter", "POST", routes.unload_adapter),
        ("/tokenize", "POST", routes.tokenize),
        ("/health", "GET", routes.health),
        ("/metrics", "GET", routes.metrics),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    for kind in (ApiError, RequestRefused, HTTPException, Exception):
        app.add_exception_handler(kind, routes.refuse)
    return app


def as_api_error(error: Exception) -> ApiError:
    """Returns an error in OpenAI's form."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestRefused):
        return ApiError(400, str(error), parameter=error.parameter)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}; the server has /v1/chat/completions and /v1/completions")
    return ApiError(500, "the server failed; its log says why")


class Routes:
    """One method for each path."""

    def __init__(self, service: Service, adapters: AdapterLoader | None) -> None:
        self._service, self._adapters = service, adapters
        self._started = int(time.time())

    async def refuse(self, http: Request, error: Exception) -> JSONResponse:
        """Returns an error in OpenAI's form."""
        refused = as_api_error(error)
        self._service.metrics.errors.labels(refused.status).inc()
        headers = {"Retry-After": "1"} if refused.status in (429, 503) else None
        if refused.status >= 500:
            log("serve", f"{http.method} {http.url.path} {refused.status}: {type(error).__name__}")
        return JSONResponse(refused.body(), refused.status, headers)

    async def chat(self, http: Request) -> Response:
        """Answers a chat."""
        request = parse(ChatRequest, await read_json(http, self._service.config))
        engine, model = self._service.find(request.model)
        tools = None if request.tool_choice == "none" else request.tools
        prompt = engine.render([message.plain() for message in request.messages], tools)
        answers = self._service.answers(engine, model, [prompt], request)
        writer = ChatWriter(engine, request, answers)
        return await self._respond(http, request, writer, answers, ResponseHead(kind="chat.completion", model=model))

    async def complete(self, http: Request) -> Response:
        """Continues a text."""
        request = parse(CompletionRequest, await read_json(http, self._service.config))
        engine, model = self._service.find(request.model)
        answers = self._service.answers(engine, model, prompts(request, engine.tokenize), request)
        writer = CompletionWriter(engine, model, request, answers)
        return await self._respond(http, request, writer, answers, ResponseHead(kind="text_completion", model=model))

    async def _respond(
        self, http: Request, request: AnyRequest, writer: Writer, answers: list[Answer], head: ResponseHead
    ) -> Response:
        """Returns the whole response, or starts a stream. Everything that a status can tell is checked before."""
        record = Record(self._service, path=http.url.path, answers=answers, model=head.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._service.slots(len(answers)))
            stack.enter_context(record)
            await writer.prepare()
            if request.stream:
                events = self._events(request, writer, answers, head=head, record=record)
                return EventStream(events, release=stack.pop_all().close)
            limit = self._service.config.request_seconds
            body = await unless_disconnected(http, in_time(limit, self._whole(request, writer, answers, head)))
            if body is None:
                record.status = CLIENT_LEFT
                return Response(status_code=CLIENT_LEFT)
            return JSONResponse(body)

    async def _whole(
        self, request: AnyRequest, writer: Writer, answers: list[Answer], head: ResponseHead
    ) -> dict[str, Any]:
        only_scored = all(answer.generation.sampling.max_tokens == 0 for answer in answers)
        pieces = [Piece("", finish="length") for _ in answers] if only_scored else await wholes(answers)
        choices = [writer.whole(index, piece) for index, piece in enumerate(pieces)]
        body = head.body(choices) | {"usage": usage(answers, request.n)}
        if request.return_token_ids:
            body["prompt_token_ids"] = list(answers[0].prompt)
        return body

    async def _events(
        self, request: AnyRequest, writer: Writer, answers: list[Answer], *, head: ResponseHead, record: Record
    ) -> AsyncIterator[str]:
        with_usage = bool(request.stream_options and request.stream_options.include_usage)
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        if request.return_token_ids:
            extra["prompt_token_ids"] = list(answers[0].prompt)
        try:
            for first in map(writer.first, range(len(answers))):
                yield event(head.body([first], chunk=True) | extra)
            extra.pop("prompt_token_ids", None)
            async with asyncio.timeout(self._service.config.request_seconds):
                async with contextlib.aclosing(merged(answers)) as pieces:
                    async for index, piece in pieces:
                        record.first_token()
                        if part := writer.chunk(index, piece):
                            yield event(head.body([part], chunk=True) | extra)
        except (ApiError, TimeoutError) as error:
            failed = error if isinstance(error, ApiError) else timed_out(self._service.config.request_seconds)
            record.status = failed.status
            yield event(failed.body())
            return
        except (asyncio.CancelledError, GeneratorExit):
            record.status = CLIENT_LEFT
            raise
        if with_usage:
            yield event(head.body([], chunk=True) | {"usage": usage(answers, request.n)})
        yield event("[DONE]")

    async def list_models(self) -> dict[str, Any]:
        """Lists the models that can be asked."""
        return {"object": "list", "data": [self._model(name) for name in self._service.names()]}

    async def show_model(self, name: str) -> dict[str, Any]:
        """Describes one model."""
        return self._model(self._service.find(name)[1])

    def _model(self, name: str) -> dict[str, Any]:
        engine, _ = self._service.find(name)
        facts = {"created": self._started, "owned_by": "finetune", "max_model_len": engine.context_tokens}
        return {"id": name, "object": "model", **facts}

    async def tokenize(self, http: Request) -> dict[str, Any]:
        """Returns the token ids of a text, or of a chat with its generation prompt."""
        request = parse(TokenizeRequest, await read_json(http, self._service.config))
        engine, _ = self._service.find(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise ApiError(400, "give either prompt or messages", parameter="prompt")
        if request.messages is not None:
            tokens = engine.render([message.plain() for message in request.messages])
        else:
            tokens = engine.tokenize(request.prompt or "")
        return {"count": len(tokens), "max_model_len": engine.context_tokens, "tokens": tokens}

    async def load_adapter(self, http: Request) -> dict[str, Any]:
        """Loads another adapter of the base."""
        request = parse(LoadAdapterRequest, await read_json(http, self._service.config))
        loader = self._guarded()
        if request.lora_name in [*self._service.names(), "adapter"]:
            raise ApiError(400, f"lora_name: {request.lora_name} is taken; choose another", parameter="lora_name")
        folder = await asyncio.to_thread(loader.load, request.lora_name, request.lora_path)
        log("serve", f"the adapter {request.lora_name} was loaded from {folder}")
        return {"message": f"{request.lora_name} was loaded"}

    async def unload_adapter(self, http: Request) -> dict[str, Any]:
        """Drops an adapter; its answers end."""
        request = parse(UnloadAdapterRequest, await read_json(http, self._service.config))
        await asyncio.to_thread(self._guarded().unload, request.lora_name)
        log("serve", f"the adapter {request.lora_name} was unloaded")
        return {"message": f"{request.lora_name} was unloaded"}

    def _guarded(self) -> AdapterLoader:
        if self._adapters is None:
            raise ApiError(403, "clients may not load adapters here; start the server with --adapters FOLDER")
        return self._adapters

    async def health(self) -> Response:
        """Says whether requests are taken."""
        dead = [engine for engine in self._service.engines if not engine.is_alive()]
        status = "draining" if self._service.draining else "dead" if dead else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self) -> Response:
        """Returns figures for Prometheus."""
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")
