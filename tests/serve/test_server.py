"""The server, asked by OpenAI's own client: it answers as the trained graph does, and refuses what it cannot keep."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

import finetune
from finetune.inference.generation import generate
from finetune.serve.config import ServeConfig
from finetune.serve.json_object import JsonGrammar
from tests.fixtures.served import ENDS, Served, openai_client, post, serving, wait_until

QUESTION = [{"role": "user", "content": "Wake me at seven on Monday, please."}]
TOKENS = 24


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai_client(server) as client:
        yield client


@pytest.fixture(scope="module")
def trained(served_run: Path) -> tuple[Any, Any]:
    """The trained graph, as `finetune.load` gives it."""
    return finetune.load(served_run)


def ask(client: openai.OpenAI, text: str = "", *, model: str = "tiny", **settings: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}] if text else QUESTION
    return client.chat.completions.create(model=model, messages=messages, **{"max_tokens": TOKENS, **settings})


def answer_of(loaded: tuple[Any, Any], messages: Any, *, limit: int = TOKENS) -> str:
    """The greedy answer by the project's own generation."""
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    (answer,) = generate(model, tokenizer, [prompt], max_new_tokens=limit, batch_rows=1, ends=ENDS)
    return str(tokenizer.decode(answer.tokens, skip_special_tokens=True))


def test_models_are_the_run_and_its_base_and_merge(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "base", "merged"]
    assert client.models.retrieve("base").id == "base"


def test_greedy_answer_is_that_of_the_trained_graph(client: openai.OpenAI, trained: tuple[Any, Any]) -> None:
    reply = ask(client)
    assert reply.choices[0].message.content == answer_of(trained, QUESTION)
    assert reply.usage.completion_tokens == TOKENS
    assert reply.choices[0].finish_reason == "length"
    prompt = trained[1].apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert reply.usage.prompt_tokens == len(prompt)


def test_base_is_the_graph_without_its_adapter(client: openai.OpenAI, trained: tuple[Any, Any]) -> None:
    with trained[0].disable_adapter():
        expected = answer_of(trained, QUESTION)
    assert ask(client, model="base").choices[0].message.content == expected
    assert expected != ask(client).choices[0].message.content


def test_merged_model_answers_by_its_own_weights(client: openai.OpenAI, served_run: Path) -> None:
    loaded = finetune.load(served_run / "export" / "safetensors")
    assert ask(client, model="merged").choices[0].message.content == answer_of(loaded, QUESTION)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 5}, {"logprobs": True}, {"n": 2}])
def test_stream_has_the_text_of_the_whole_answer(client: openai.OpenAI, settings: dict[str, Any]) -> None:
    whole = ask(client, **settings)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **settings))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
    assert chunks[-1].usage == whole.usage


def test_logprobs_are_those_of_a_plain_forward_pass(client: openai.OpenAI, trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    reply = ask(client, logprobs=True, top_logprobs=3, extra_body={"return_token_ids": True})
    answer = reply.choices[0].token_ids
    ids = torch.tensor([reply.prompt_token_ids + answer])
    with torch.no_grad():
        plain = torch.log_softmax(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float(), -1)
    places = range(len(reply.prompt_token_ids) - 1, ids.shape[1] - 1)
    given = reply.choices[0].logprobs.content
    assert len(given) == len(answer) == TOKENS
    for place, token, entry in zip(places, answer, given, strict=True):
        assert entry.logprob == pytest.approx(float(plain[place, token]), abs=2e-4)
        best = plain[place].topk(3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=2e-4)
        assert entry.token == tokenizer.decode([token])


def test_scored_prompt_has_the_logprobs_of_a_plain_forward_pass(
    client: openai.OpenAI, trained: tuple[Any, Any]
) -> None:
    model, tokenizer = trained
    ids = tokenizer("The capital of France is Paris.").input_ids
    reply = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=2)
    with torch.no_grad():
        plain = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
    scores = reply.choices[0].logprobs
    expected = [float(plain[place, token]) for place, token in enumerate(ids[1:])]
    assert scores.token_logprobs[0] is None
    assert scores.token_logprobs[1:] == pytest.approx(expected, abs=2e-4)
    assert reply.choices[0].text == "The capital of France is Paris."
    assert scores.text_offset[0] == 0
    assert reply.usage.completion_tokens == 0


def test_a_seed_repeats_and_another_differs(client: openai.OpenAI) -> None:
    texts = [ask(client, temperature=1.0, seed=seed).choices[0].message.content for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_choices_of_one_request_differ_and_the_first_is_that_of_the_seed(client: openai.OpenAI) -> None:
    choices = ask(client, temperature=1.0, seed=3, n=3).choices
    assert len({choice.message.content for choice in choices}) == 3
    assert choices[0].message.content == ask(client, temperature=1.0, seed=3).choices[0].message.content


def test_a_tiny_nucleus_is_greedy(client: openai.OpenAI) -> None:
    drawn = ask(client, temperature=2.0, top_p=1e-6, seed=1)
    assert drawn.choices[0].message.content == ask(client).choices[0].message.content


@pytest.mark.parametrize("seed", range(6))
def test_json_object_is_kept(client: openai.OpenAI, tokenizer: Any, seed: int) -> None:
    """A whole answer is read as JSON; one that reaches its limit is the beginning of an object."""
    settings: dict[str, Any] = {"response_format": {"type": "json_object"}, "temperature": 1.0, "seed": seed}
    choice = ask(client, **settings, max_tokens=60, extra_body={"return_token_ids": True}).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:
        matcher = LLMatcher(from_tokenizer(tokenizer), LLMatcher.grammar_from_json_schema({"type": "object"}))
        assert matcher.consume_tokens(choice.token_ids), matcher.get_error()
    assert ask(client, **settings, max_tokens=60).choices[0].message.content == choice.message.content


def test_object_that_its_grammar_ended_is_followed_by_an_end_token_only(tokenizer: Any) -> None:
    answer = JsonGrammar(tokenizer, ENDS).start()
    logits = torch.zeros(len(tokenizer))
    for token in tokenizer('{"a": [1]}').input_ids:
        assert answer.mask(logits)[token] == 0
        assert answer.add(token) == ""
    assert answer.mask(logits).isfinite().nonzero().flatten().tolist() == ENDS


def test_token_that_breaks_the_object_is_an_error_of_its_answer_alone(tokenizer: Any) -> None:
    answer = JsonGrammar(tokenizer, ENDS).start()
    assert answer.add(tokenizer("]").input_ids[0]) == "the grammar of JSON failed for this answer"


@pytest.mark.parametrize("stream", [False, True])
def test_answer_ends_before_a_stop_string(client: openai.OpenAI, stream: bool) -> None:
    whole = ask(client).choices[0].message.content
    stop = whole[5:9]
    reply = ask(client, stop=[stop, "never"], stream=stream)
    if stream:
        parts = [chunk.choices[0] for chunk in reply]
        text, reason = "".join(part.delta.content or "" for part in parts), parts[-1].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_completion_continues_text_and_token_ids_alike(client: openai.OpenAI, trained: tuple[Any, Any]) -> None:
    text = "Book a table for two"
    prompts: Any = [text, trained[1](text).input_ids]
    texts = [client.completions.create(model="tiny", prompt=prompt, max_tokens=8).choices[0].text for prompt in prompts]
    both = client.completions.create(model="tiny", prompt=[text, "user"], max_tokens=8)
    assert texts[0] == texts[1] == both.choices[0].text != both.choices[1].text


def test_tokens_of_a_chat_are_those_of_the_template(server: Served, trained: tuple[Any, Any]) -> None:
    reply = post(server, "/tokenize", {"model": "tiny", "messages": QUESTION}).json()
    expected = trained[1].apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert reply["tokens"] == expected


def test_concurrent_clients_get_the_answers_that_each_gets_alone(client: openai.OpenAI, server: Served) -> None:
    """Adapters, lengths and samplings mixed, and more clients than rows."""
    post(server, "/v1/load_lora_adapter", {"lora_name": "second", "lora_path": "second"}).raise_for_status()
    cases = [
        (f"Wake me at {number} on Monday" + ", please" * (number % 5), model, {"temperature": t, "seed": number})
        for number, model in enumerate(["tiny", "second", "base", "merged"] * 4)
        for t in [float(number % 2)]
    ]

    def run(case: tuple[str, str, dict[str, Any]]) -> str:
        text, model, settings = case
        reply = ask(client, text, model=model, stream=True, max_tokens=8 + len(text) % 9, **settings)
        return "".join(chunk.choices[0].delta.content or "" for chunk in reply)

    alone = [run(case) for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(run, cases))
    assert together == alone
    by_model = {model: ask(client, model=model).choices[0].message.content for model in ("tiny", "second", "base")}
    assert len(set(by_model.values())) == 3
    post(server, "/v1/unload_lora_adapter", {"lora_name": "second"}).raise_for_status()
    with pytest.raises(openai.NotFoundError):
        ask(client, model="second")
    assert ask(client).choices[0].message.content == by_model["tiny"]


def test_client_that_leaves_stops_its_generation(client: openai.OpenAI, server: Served) -> None:
    with ask(client, stream=True, max_tokens=200) as stream:
        next(iter(stream))
        assert server.service.open == 1
    wait_until(lambda: server.opened.engines[0].load().running == 0)
    wait_until(lambda: server.service.open == 0)
    written = _figure(server, 'finetune_requests_total{model="tiny",path="/v1/chat/completions",status="499"}')
    assert written >= 1


def _figure(server: Served, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", trust_env=False).text.splitlines()
    found = [line for line in lines if line.startswith(name)]
    return float(found[0].split()[-1]) if found else 0.0  # a counter has no line before its first request


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "other"}, 404, "the model 'other' is not served here; ask one of tiny, base, merged"),
    ({"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0; got -1"),
    ({"top_p": 0}, 400, "top_p: "),
    ({"max_tokens": 0}, 400, "max_tokens: must be at least 1"),
    ({"max_tokens": 201}, 400, "max_tokens: this server writes at most 200 tokens; got 201"),
    ({"n": 0}, 400, "n: "),
    ({"messages": []}, 400, "messages: "),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role: "),
    ({"messages": [{"role": "user", "content": "a " * 300}]}, 400, "this server reads at most 200 tokens"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages.0.content"),
    ({"stop": [""]}, 400, "stop: "),
    ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs=true"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options needs stream=true"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.type: "),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "this model's chat template does not show"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty is not supported; leave it out"),
    ({"nonsense": 1}, 400, "nonsense is not supported; leave it out"),
]


@pytest.mark.parametrize(("change", "status", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refusals_have_openais_form_and_the_server_continues(
    server: Served, change: dict[str, Any], status: int, message: str
) -> None:
    good = {"model": "tiny", "messages": QUESTION, "max_tokens": 2}
    reply = post(server, "/v1/chat/completions", good | change)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].startswith(message)
    assert post(server, "/v1/chat/completions", good).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ({"content": b"{nonsense", "headers": {"Content-Type": "application/json"}}, 400),
        ({"content": b"[]", "headers": {"Content-Type": "application/json"}}, 400),
        ({"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 400),
        ({"content": b'{"model": "\\ud800"}', "headers": {"Content-Type": "application/json"}}, 400),
        ({"content": b" " * (2 << 20), "headers": {"Content-Type": "application/json"}}, 413),
        ({"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415),
        ({"json": {}, "headers": {"Host": "evil.example"}}, 403),
    ],
)
def test_bodies_that_cannot_be_read_are_refused(server: Served, arguments: dict[str, Any], status: int) -> None:
    reply = post(server, "/v1/chat/completions", **arguments)
    assert (reply.status_code, "message" in reply.json()["error"]) == (status, True)


def test_unknown_paths_and_methods_have_openais_form(server: Served) -> None:
    assert httpx.get(f"{server.url}/v1/nothing", trust_env=False).json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server.url}/v1/completions", trust_env=False).status_code == 405


def test_token_ids_outside_the_vocabulary_are_refused(server: Served) -> None:
    reply = post(server, "/v1/completions", {"model": "tiny", "prompt": [5, 600], "max_tokens": 1})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("../tiny/export/adapter", 403, "adapters are loaded from below"),
        ("missing", 400, "holds no finetune.json"),
    ],
)
def test_adapters_come_from_their_folder_only(server: Served, path: str, status: int, message: str) -> None:
    reply = post(server, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
    assert reply.status_code == status
    assert message in reply.json()["error"]["message"]


def test_adapter_of_another_base_is_refused(server: Served, served_run: Path) -> None:
    import shutil

    from finetune.run import write_json

    wrong = served_run.parent / "others" / "wrong"
    shutil.copytree(served_run / "export" / "adapter", wrong)
    record = json.loads((wrong / "finetune.json").read_text())
    record["base"]["sha256"] = "0" * 64
    write_json(wrong / "finetune.json", record)
    reply = post(server, "/v1/load_lora_adapter", {"lora_name": "wrong", "lora_path": "wrong"})
    assert reply.status_code == 400
    assert "was trained with another base" in reply.json()["error"]["message"]


def test_health_and_figures(server: Served, client: openai.OpenAI) -> None:
    before = _figure(server, 'finetune_completion_tokens_total{model="base"}')
    ask(client, model="base", max_tokens=3)
    assert _figure(server, 'finetune_completion_tokens_total{model="base"}') == before + 3
    assert _figure(server, "finetune_resident_bytes") > 1e8
    assert httpx.get(f"{server.url}/health", trust_env=False).json() == {"status": "ok"}


@pytest.fixture(scope="module")
def guarded(served_run: Path) -> Iterator[Served]:
    """A server with a key, one row at a time, and no queue."""
    config = ServeConfig(api_key="secret", concurrent=1, waiting=0, request_seconds=30.0, drain_seconds=0.2)
    with serving(served_run, config, "adapter") as served:
        yield served


def keyed(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_key_is_required(guarded: Served) -> None:
    content = {"model": "adapter", "messages": QUESTION, "max_tokens": 2}
    replies = {key: post(guarded, "/v1/chat/completions", content, headers=keyed(key)) for key in ("secret", "wrong")}
    assert replies["secret"].json()["model"] == "tiny"
    assert replies["wrong"].status_code == 401
    assert post(guarded, "/v1/chat/completions", content).json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{guarded.url}/metrics", trust_env=False).status_code == 401
    assert httpx.get(f"{guarded.url}/health", trust_env=False).status_code == 200


@pytest.fixture
def held(guarded: Served) -> Iterator[Callable[[], None]]:
    """The engine waits between two tokens until it is released; a request runs meanwhile."""
    gate = threading.Event()
    engine: Any = guarded.opened.engines[0]
    holder = threading.Thread(target=engine.call, args=[gate.wait])
    holder.start()
    content = {"model": "tiny", "messages": QUESTION, "max_tokens": 4}
    running = threading.Thread(
        target=post, args=[guarded, "/v1/chat/completions", content], kwargs={"headers": keyed("secret")}
    )
    running.start()
    wait_until(lambda: guarded.service.open == 1)
    yield gate.set
    gate.set()
    running.join()
    holder.join()


def test_full_queue_is_refused_with_429(guarded: Served, held: Callable[[], None]) -> None:
    content = {"model": "tiny", "messages": QUESTION, "max_tokens": 4}
    reply = post(guarded, "/v1/chat/completions", content, headers=keyed("secret"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
    assert reply.headers["Retry-After"]
    held()
    wait_until(lambda: guarded.service.open == 0)
    assert post(guarded, "/v1/chat/completions", content, headers=keyed("secret")).status_code == 200


def test_request_that_takes_too_long_ends_with_504(guarded: Served, held: Callable[[], None]) -> None:
    guarded.service.config.waiting, guarded.service.config.request_seconds = 1, 0.2
    try:
        content = {"model": "tiny", "messages": QUESTION}
        reply = post(guarded, "/v1/chat/completions", content, headers=keyed("secret"))
        assert (reply.status_code, reply.json()["error"]["type"]) == (504, "timeout_error")
        streamed = post(guarded, "/v1/chat/completions", content | {"stream": True}, headers=keyed("secret"))
        assert json.loads(streamed.text.splitlines()[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    finally:
        guarded.service.config.waiting, guarded.service.config.request_seconds = 0, 30.0


def test_draining_ends_with_its_time(guarded: Served, held: Callable[[], None]) -> None:
    import asyncio

    from finetune.serve.run import drain

    asyncio.run(drain(guarded.service))
    assert guarded.service.open == 1
    held()
    guarded.service.config.drain_seconds = 30.0
    asyncio.run(drain(guarded.service))
    assert guarded.service.open == 0


def test_server_that_ends_refuses_new_requests_with_503(guarded: Served) -> None:
    guarded.service.draining = True
    try:
        content = {"model": "tiny", "messages": QUESTION}
        assert post(guarded, "/v1/chat/completions", content, headers=keyed("secret")).status_code == 503
        assert httpx.get(f"{guarded.url}/health", trust_env=False).json() == {"status": "draining"}
    finally:
        guarded.service.draining = False
