"""Serves a GGUF file in llama.cpp: its own server, inside this process, batches the answers."""

from __future__ import annotations

import importlib.util
import os
import secrets
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetune.errors import ModelError
from finetune.inference.chat import Chat
from finetune.openai_api import FORCING_BIAS
from finetune.serve.chat_template import parse_tools
from finetune.serve.engine import Event, Finish, Generation, Load, Message, RequestRefused, Sampling, Token
from finetune.serve.upstream import Upstream, UpstreamError, deliver

PACKAGE = "xllamacpp"

NEUTRAL = {"min_p": 0.0, "repeat_penalty": 1.0, "cache_prompt": False, "return_tokens": True, "stream": True}
"""llama.cpp's defaults are top_k=40, min_p=0.05 and a cache of prompts, which changes rounding."""


class LlamaEngine:
    """Sends token ids to llama.cpp's server and reads tokens back.

    Args:
        file: A GGUF file with a tokenizer and a chat template.
        name: What a request calls it.
        chat: Tokenizer and system message of the training; None for a file alone, which then takes no tools.
        concurrent: Answers at the same time.
        context_tokens: Longest prompt and answer together; memory is kept for ``concurrent`` times as many.
        threads: Of llama.cpp.

    Raises:
        ModelError: xllamacpp is missing, or llama.cpp cannot open the file.
    """

    supports_json = True

    def __init__(
        self, file: Path, *, name: str, chat: Chat | None, concurrent: int, context_tokens: int, threads: int
    ) -> None:
        if importlib.util.find_spec(PACKAGE) is None:
            raise ModelError(f"{file}: llama.cpp's binding is not installed; run: pip install 'finetune-qlora[gguf]'")
        if not file.is_file():
            raise ModelError(f"{file} does not exist; give the path of a .gguf file")
        # llama.cpp's threads wait by spinning, which slows down other processes on the same cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_parallel, params.n_ctx = concurrent, concurrent * context_tokens
        params.verbosity, params.warmup, params.use_jinja = -1, False, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        key = secrets.token_hex()
        params.api_keys = [key]  # llama.cpp's server listens too, on a port that other users could ask
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ModelError(f"llama.cpp cannot open {file}: {error}") from error
        self._file, self._name, self._chat = file, name, chat
        self._slots, self.context_tokens = concurrent, context_tokens
        self._llama = Upstream(self._server.listening_address, key)
        self._running: set[Generation] = set()
        self._texts: dict[int, str] = {}
        self.vocabulary = self._llama.ask("/v1/models")["data"][0]["meta"]["n_vocab"]

    def names(self) -> list[str]:
        """Returns the name of the file's model."""
        return [self._name]

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Returns the token ids of a chat, by the file's template and tokenizer."""
        if tools and self._chat is None:
            raise RequestRefused(
                "tools need the tokenizer of the training, to read the calls; serve the run's folder, not the file",
                parameter="tools",
            )
        if self._chat is not None and self._chat.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._chat.system}, *messages]
        prompt = self._template(messages, tools)
        if tools and prompt == self._template(messages, None):
            raise RequestRefused("this model's chat template does not show tools to the model", parameter="tools")
        return self.tokenize(prompt)

    def _template(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
        body = {"messages": list(messages)} | ({"tools": list(tools)} if tools else {})
        try:
            return str(self._llama.ask("/apply-template", body)["prompt"])
        except UpstreamError as error:
            raise RequestRefused(
                f"this model's chat template cannot render these messages: {error}", parameter="messages"
            ) from error

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of plain text."""
        request = {"content": text, "add_special": True, "parse_special": True}
        tokens: list[int] = self._llama.ask("/tokenize", request)["tokens"]
        return tokens

    def token_text(self, token: int) -> str:
        """Returns the text of one token."""
        if token not in self._texts:
            self._texts[token] = self._llama.ask("/detokenize", {"tokens": [token]})["content"]
        return self._texts[token]

    def parse_tools(self, tokens: Sequence[int], prompt: Sequence[int], text: str) -> tuple[str, list[dict[str, str]]]:
        """Returns an answer's text without its tool calls, and those, by the same rules as in transformers."""
        if self._chat is None:
            return text, []
        return parse_tools(self._chat.tokenizer, self._family, tokens, prompt, text)

    @cached_property
    def _family(self) -> Any:
        """Returns an object whose ``config.model_type`` is what transformers calls the file's architecture."""
        from gguf import GGUFReader
        from transformers import CONFIG_MAPPING

        field = GGUFReader(self._file).get_field("general.architecture")
        written = str(field.contents()) if field else ""
        known = (name for name in CONFIG_MAPPING if name.replace("_", "") == written)
        return SimpleNamespace(config=SimpleNamespace(model_type=next(known, written)))

    def start(self, generation: Generation) -> None:
        """Starts an answer, in a thread that reads llama.cpp's stream."""
        self._running.add(generation)
        threading.Thread(target=self._generate, args=[generation], name="llama.cpp", daemon=True).start()

    def score(self, model: str, tokens: Sequence[int], *, top: int) -> list[Token]:
        """Returns each token of a text with its log-probability after the ones before it; the first has None.

        llama.cpp gives log-probabilities of what it writes only, so it is made to write the text, one token a request;
        it keeps what it has read. Tokens after which a character is incomplete have None, as in an answer.
        """
        scored = [Token(tokens[0], self.token_text(tokens[0]))]
        for place, token in enumerate(tokens[1:], 1):
            body = _body(Sampling(max_tokens=1, top_logprobs=top), tokens[:place])
            forced = {"logit_bias": [[token, FORCING_BIAS]], "cache_prompt": True, "stream": False}
            written = self._llama.ask("/completion", body | forced).get("completion_probabilities") or []
            found = next((score for score in written if score["id"] == token), None)
            text = self.token_text(token)
            scored.append(Token(token, text, *_scores(found, top)) if found else Token(token, text))
        return scored

    def load(self) -> Load:
        """Returns how many answers run and wait for a slot; llama.cpp does not report its cache."""
        running = min(len(self._running), self._slots)
        return Load(running=running, waiting=len(self._running) - running, cache_bytes=0)

    def is_alive(self) -> bool:
        """Returns whether llama.cpp's server answers."""
        try:
            return bool(self._llama.ask("/health")["status"] == "ok")
        except UpstreamError:
            return False

    def close(self) -> None:
        """Ends every answer and the server."""
        for generation in list(self._running):
            generation.cancel()
        del self._server

    def _generate(self, generation: Generation) -> None:
        events = self._whole(generation) if generation.sampling.every_token else self._streamed(generation)
        deliver(events, generation, running=self._running, program="llama.cpp")

    def _streamed(self, generation: Generation) -> Iterator[Event]:
        """Yields tokens as they come. llama.cpp sends the tokens of one character as the last of them."""
        body = _body(generation.sampling, generation.prompt)
        for event in self._llama.stream("/completion", body, generation):
            if event.get("stop"):
                yield _finish(event)
                return
            for index, token in enumerate(event["tokens"]):
                yield Token(token, event["content"] if index == len(event["tokens"]) - 1 else "")

    def _whole(self, generation: Generation) -> Iterator[Event]:
        """Yields every token when the answer is complete, the last one with the whole text.

        llama.cpp gives no log-probabilities of tokens after which a character is incomplete; theirs are None."""
        top = generation.sampling.top_logprobs
        body = _body(generation.sampling, generation.prompt) | {"stream": False}
        reply = self._llama.ask("/completion", body, generation=generation)
        tokens = reply["tokens"][:-1] if reply["stop_type"] == "eos" else reply["tokens"]
        scores = deque(reply.get("completion_probabilities") or [])
        for index, token in enumerate(tokens):
            text = reply["content"] if index == len(tokens) - 1 else ""
            if top is None or not scores or scores[0]["id"] != token:
                yield Token(token, text)
                continue
            score = scores.popleft()
            self._texts |= {other["id"]: other["token"] for other in (score, *score["top_logprobs"])}
            yield Token(token, text, *_scores(score, top))
        yield _finish({**reply, "content": "" if tokens else reply["content"]})


def _body(sampling: Sampling, prompt: Sequence[int]) -> dict[str, Any]:
    body: dict[str, Any] = {
        **NEUTRAL,
        "prompt": list(prompt),
        "n_predict": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed % (2**32 - 1),  # the largest 32-bit number stands for a random seed
        "n_probs": 0 if sampling.top_logprobs is None else max(sampling.top_logprobs, 1),
    }
    return {**body, "json_schema": {"type": "object"}} if sampling.json_object else body


def _scores(score: Mapping[str, Any], top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Returns the log-probability of a token that llama.cpp wrote, and the best ones at its place."""
    best = tuple((other["id"], other["logprob"]) for other in score["top_logprobs"][:top])
    return score["logprob"], best


def _finish(event: Mapping[str, Any]) -> Finish:
    reason = "stop" if event["stop_type"] == "eos" else "length"
    return Finish(reason, event["tokens_predicted"], event["content"])
