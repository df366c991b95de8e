"""The server that is verified: what it can be asked over OpenAI's API, and what else vLLM and llama.cpp answer."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import ConfigError
from finetune.openai_api import FORCING_BIAS, error_message

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Refused(Exception):
    """The server does not do what was asked.

    Args:
        status: Of HTTP; 0 where the connection failed.
        message: What the server says.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer.

    Attributes:
        text: Without special tokens.
        finish: ``stop`` or ``length``, as the server says.
        prompt_tokens: How many tokens the prompt had; None where the server does not say.
        prompt_ids: Its token ids; None where the server does not say.
    """

    text: str
    finish: str | None
    prompt_tokens: int | None
    prompt_ids: list[int] | None


class Endpoint:
    """Asks one model of a server, greedily.

    Args:
        url: With or without ``/v1``.
        model: Name of the model there.
        key: Sent as ``Authorization: Bearer KEY``; empty for none.
        seconds: Longest wait for one answer.
    """

    def __init__(self, url: str, model: str, *, key: str, seconds: float) -> None:
        self.root = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.model, self._key, self._seconds = model, key, seconds
        host = urllib.parse.urlsplit(self.root).hostname
        proxies: dict[str, str] | None = (
            {} if host in LOOPBACK else None
        )  # a proxy cannot reach this machine's own address
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))

    def models(self) -> list[str]:
        """Returns the names of the server's models.

        Raises:
            ConfigError: Nothing listens, the key is wrong, or it is not an OpenAI-compatible server.
        """
        try:
            reply = self._ask("/v1/models")
            return [str(model["id"]) for model in reply["data"]]
        except Refused as error:
            if error.status in (401, 403):
                raise ConfigError(f"url={self.root}: {error}; give --api-key, or set FINETUNE_API_KEY") from error
            if error.status:
                raise ConfigError(f"url={self.root} is not an OpenAI-compatible server: /v1/models: {error}") from error
            raise ConfigError(f"url={self.root}: {error}; start the server, or give the address it prints") from error
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"url={self.root} is not an OpenAI-compatible server: /v1/models has no list of models"
            ) from error

    def chat(self, chat: Mapping[str, Any], *, max_tokens: int) -> Reply:
        """Returns the greedy answer to a chat, by the server's own template.

        Raises:
            Refused: The server does not answer.
        """
        body = {**chat, "model": self.model, "max_tokens": max_tokens, "temperature": 0}
        return _reply(self._with_token_ids("/v1/chat/completions", body))

    def complete(self, prompt: Sequence[int], *, max_tokens: int) -> Reply:
        """Returns the greedy continuation of token ids, past the server's template.

        Raises:
            Refused: The server does not take token ids.
        """
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0}
        return _reply(self._with_token_ids("/v1/completions", body))

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Returns the token ids of a chat with its generation prompt, as the server writes it.

        Raises:
            Refused: It has no route for that. vLLM and this project have ``/tokenize``, llama.cpp ``/apply-template``.
        """
        reply = self._ask("/tokenize", {"model": self.model, "messages": list(messages)})
        if "count" not in reply:  # llama.cpp's route of the same name takes a text
            prompt = self._ask("/apply-template", {"messages": list(messages)})["prompt"]
            reply = self._ask("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})
        return [int(token) for token in reply["tokens"]]

    def score(self, tokens: Sequence[int], places: Sequence[int]) -> dict[int, float]:
        """Returns the log-probabilities of the tokens at these places, without those that the server gives none for.

        Args:
            tokens: Of a text.
            places: Of tokens after the first.

        Raises:
            Refused: The server gives no log-probabilities of a prompt.
        """
        try:
            scores = self._score_prompt(tokens)
        except Refused as error:
            if error.status in (0, 500, 503):
                raise
            return self._score_by_writing(tokens, places, refused=error)
        return {place: score for place in places if (score := scores[place]) is not None}

    def _score_prompt(self, tokens: Sequence[int]) -> list[float | None]:
        """Asks for the log-probabilities of a whole prompt at once."""
        body = {"model": self.model, "prompt": list(tokens), "echo": True, "logprobs": 1, "temperature": 0}
        try:
            reply = self._ask("/v1/completions", {**body, "max_tokens": 0})
        except Refused as error:
            if error.status not in (400, 422):
                raise
            reply = self._ask("/v1/completions", {**body, "max_tokens": 1})
        scores = (reply["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
        if len(scores) < len(tokens) or not any(isinstance(score, float) for score in scores[1 : len(tokens)]):
            raise Refused(200, "it ignores echo with logprobs")
        return list(scores[: len(tokens)])

    def _score_by_writing(self, tokens: Sequence[int], places: Sequence[int], *, refused: Refused) -> dict[int, float]:
        """Makes llama.cpp's server write each token, since it gives log-probabilities of what it writes only."""
        scores: dict[int, float] = {}
        for place in places:
            body = {
                "prompt": list(tokens[:place]),
                "logit_bias": [[tokens[place], FORCING_BIAS]],
                "n_predict": 1,
                "n_probs": 1,
                "temperature": 0,
                "cache_prompt": True,
            }
            try:
                written = self._ask("/completion", body)["completion_probabilities"]
            except (Refused, KeyError) as error:
                if isinstance(error, Refused) and error.status in (0, 500, 503):
                    raise
                raise refused from error
            found = next((score for score in written if score["id"] == tokens[place]), None)
            if found is not None:
                scores[place] = float(found["logprob"])
        return scores

    def _with_token_ids(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Asks for token ids too, as vLLM takes it; a server that refuses the parameter is asked without it."""
        try:
            return self._ask(path, {**body, "return_token_ids": True})
        except Refused as error:
            if error.status not in (400, 422):
                raise
            return self._ask(path, body)

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            request = urllib.request.Request(self.root + path, data, headers)
            with self._opener.open(request, timeout=self._seconds) as response:
                reply = json.load(response)
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error_message(error.read(), reason=str(error.reason))) from error
        except TimeoutError as error:
            raise Refused(0, f"no answer to {path} within {self._seconds:g} s") from error
        except urllib.error.URLError as error:
            raise Refused(0, f"nothing answers there: {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            raise Refused(0, f"the connection failed: {error!r}") from error
        except ValueError as error:
            raise Refused(200, f"{path} answers no JSON") from error
        if not isinstance(reply, dict):
            raise Refused(200, f"{path} answers {type(reply).__name__}, not an object")
        return reply


def _reply(reply: Mapping[str, Any]) -> Reply:
    try:
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (KeyError, IndexError, TypeError) as error:
        raise Refused(200, f"it answers without choices: {str(reply)[:100]}") from error
    ids = reply.get("prompt_token_ids") or choice.get("prompt_token_ids")
    return Reply(
        text=text or "",
        finish=choice.get("finish_reason"),
        prompt_tokens=usage.get("prompt_tokens"),
        prompt_ids=[int(token) for token in ids] if ids else None,
    )
