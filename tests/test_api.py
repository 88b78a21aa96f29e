"""The application over HTTP: what clients read field by field, what is refused and how, and that chunks say what a whole reply says.

Two engines stand behind it: the real one over a tiny random model where numbers count, and a scripted one where the model must think or
call tools. Every reply's status is checked against the OpenAPI document on the way.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
import struct
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from scripted import ScriptedEngine, hang_up, make_service, make_tokenizer, served, until
from sqlalchemy import text as sql

from jevons.engine.engine import Engine
from jevons.model.attend import Packed
from jevons.model.config import ModelConfig
from jevons.model.transformer import Transformer
from jevons.server.anthropic import MessageRequest
from jevons.server.app import Gate, build, check_json
from jevons.server.catalog import DetokenizeBody, EmbeddingBody, TokenizeBody
from jevons.server.chat import ChatBody, ChatMessage
from jevons.server.completion import CompletionBody
from jevons.server.error import APIError
from jevons.server.limit import Limits
from jevons.server.response import ResponseRequest
from jevons.server.vocabulary import Vocabulary

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False},
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


class Documented(TestClient):
    """A client that holds each reply to the OpenAPI document of its server."""

    def request(self, method, url, **options):
        response = super().request(method, url, **options)
        path = str(response.request.url.path)
        paths = self.app.openapi()["paths"]
        operation = paths.get(path, {}).get(method.lower())
        if operation:
            documented = operation["responses"].get(str(response.status_code))
            assert documented, (method, path, response.status_code)
            assert response.headers["content-type"].partition(";")[0] in documented["content"]
        assert response.headers["x-request-id"].startswith("req_")
        return response


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def scripted(tokenizer, tmp_path):
    """`scripted(*replies, ...)`: a client and the engine behind it."""
    yield from starter(tokenizer, tmp_path)


@pytest.fixture(scope="module")
def refusing(tokenizer, tmp_path_factory):
    """One scripted client for many requests that never reach the engine."""
    clients = starter(tokenizer, tmp_path_factory.mktemp("refusing"))
    yield next(clients)("x")
    next(clients, None)


def starter(tokenizer, tmp_path):
    clients = []

    def start(*replies, limits=None, keyed=False, tokenizer=tokenizer, **options):
        engine = ScriptedEngine(tokenizer, *replies, **options)
        service, keys = make_service(engine, tokenizer, tmp_path / f"{len(clients)}.db", limits=limits, keyed=keyed)
        client = Documented(build(service, keys, drain=1.0), raise_server_exceptions=False)
        client.service, client.keys, client.engine = service, keys, engine
        client.__enter__()
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def model(tokenizer):
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": tokenizer.size, "eos_token_id": tokenizer.eos_id}
    model = Transformer(ModelConfig(**fields, model_type="qwen2", tie_word_embeddings=True))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def real(tokenizer, model, tmp_path_factory):
    """A client of a real engine over a tiny random model."""
    service, _ = make_service(Engine(model, num_blocks=128, max_sequences=8), tokenizer, tmp_path_factory.mktemp("real") / "ledger.db")
    with Documented(build(service, None, drain=1.0), raise_server_exceptions=False) as client:
        client.service = service
        yield client


def chat(client, *messages, **fields):
    return client.post(CHAT, json={"model": "tiny", "messages": list(messages) or [USER], **fields})


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


def chunks(response):
    assert response.status_code == 200, response.text
    frames = [frame for frame in response.text.split("\n\n") if frame and not frame.startswith(":")]
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def joined(chunks):
    """The message and log-probabilities that chunks add up to, by choice, as a client adds them."""
    choices: dict[int, dict] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            if part["index"] not in choices:
                assert part["delta"]["role"] == "assistant"  # in the first delta of each choice
                choices[part["index"]] = {"content": "", "reasoning_content": None, "calls": [], "logs": {}, "finish": None}
            choice, delta = choices[part["index"]], part["delta"]
            assert choice["finish"] is None, "something came after the end"
            assert sum(bool(delta.get(key)) for key in ("content", "reasoning_content", "tool_calls")) <= 1
            choice["content"] += delta.get("content") or ""
            if "reasoning_content" in delta:
                choice["reasoning_content"] = (choice["reasoning_content"] or "") + delta["reasoning_content"]
            for call in delta.get("tool_calls", []):
                if call["index"] == len(choice["calls"]):
                    assert call["id"] and call["type"] == "function" and call["function"]["name"]
                    choice["calls"].append({"name": call["function"]["name"], "arguments": ""})
                choice["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            for key, value in (part["logprobs"] or {}).items():
                choice["logs"].setdefault(key, []).extend(value or [])
            choice["finish"] = part["finish_reason"]
    return choices


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("reply", ["Hello there.", "<think>Hm.</think>\n\nYes.", f"Wait.{CALL}{CALL}", "<think>never ends", "é€😀 ü", ""])
def test_chunks_add_up_to_the_whole(scripted, reply, n):
    client = scripted(reply)
    options = {"n": n, "logprobs": True, "top_logprobs": 2, "tools": [TOOL]}
    whole = ok(chat(client, **options))
    parts = chunks(chat(client, **options, stream=True, stream_options={"include_usage": True}))
    assert len({chunk["id"] for chunk in parts}) == 1 and parts[0]["object"] == "chat.completion.chunk"
    *others, last = parts
    assert last["choices"] == [] and all(chunk["usage"] is None for chunk in others)
    timeless = ["prompt_tokens", "completion_tokens", "total_tokens", "prompt_cache_hit_tokens", "completion_tokens_details"]
    assert [last["usage"][k] for k in timeless] == [whole["usage"][k] for k in timeless]
    sums = joined(others)
    assert sorted(sums) == list(range(n)) == [choice["index"] for choice in whole["choices"]]
    for choice in whole["choices"]:
        message, got = choice["message"], sums[choice["index"]]
        assert got["content"] == (message["content"] or "")
        assert (got["reasoning_content"] or "") == message.get("reasoning_content", "")
        assert got["calls"] == [call["function"] for call in message.get("tool_calls", [])]
        assert got["finish"] == choice["finish_reason"] == ("tool_calls" if CALL in reply else "stop")
        assert {k: v for k, v in got["logs"].items() if v} == {k: v for k, v in (choice["logprobs"] or {}).items() if v}


def test_usage_is_what_the_ledger_holds(scripted):
    client = scripted("<think>Hm.</think>Yes.", "No.")
    usage = ok(chat(client, n=2))["usage"]
    with client.service.meter.store.engine.connect() as connection:
        row = connection.execute(sql("SELECT prompt, cached, completion, reasoning, money, ttft, status FROM usage")).one()
    assert row[:2] == (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])
    assert row[2:4] == (usage["completion_tokens"], usage["completion_tokens_details"]["reasoning_tokens"])
    assert usage["jevons"]["cost"] == row[4] and usage["jevons"]["time"]["first_token"] == row[5] and row[6] == "stop"
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_cache_hits_are_shown(real):
    messages = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 3}]
    for fresh in (True, False):
        usage = ok(chat(real, *messages, max_tokens=2))["usage"]
        hit, miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
        assert hit + miss == usage["prompt_tokens"] and usage["prompt_tokens_details"]["cached_tokens"] == hit
        assert (hit == 0) is fresh
    assert ok(chat(real, *messages, max_tokens=2, user_id="someone"))["usage"]["prompt_cache_hit_tokens"] == 0  # another user's cache


def test_log_probabilities_name_the_content(scripted):
    for reply in ("Hello there.", "é€😀"):
        choice = ok(chat(scripted(reply), logprobs=True))["choices"][0]
        entries = choice["logprobs"]["content"]
        assert bytes(b for entry in entries for b in entry["bytes"]).decode() == choice["message"]["content"] == reply
        assert all(entry["top_logprobs"] == [] and entry["logprob"] == -0.25 for entry in entries)
    choice = ok(chat(scripted("<think>Hm</think>Yes"), logprobs=True, logprobs_mode="sampled"))["choices"][0]
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == "Yes"
    assert "Hm" in "".join(entry["token"] for entry in choice["logprobs"]["reasoning_content"])
    assert choice["logprobs"]["content"][0]["logprob"] == -0.125


def test_vocabulary_is_the_decoder(tokenizer):
    vocabulary, text = Vocabulary(tokenizer), "The fox é€😀 <think>x</think> {}\n"
    ids = tokenizer.encode(text)
    assert b"".join(map(vocabulary.data, ids)).decode() == text
    assert {vocabulary.text(id) for id in tokenizer.encode("é")} <= {"é", "bytes:\\xc3", "bytes:\\xa9"}
    assert vocabulary.data(10**6) == b""


# --- completions


def test_echoed_prompts_are_scored_as_lm_eval_reads_them(real, model, tokenizer):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, tokenizer.size, (length,), generator=generator).tolist() for length in (5, 17, 2)]
    request = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = ok(real.post(COMPLETIONS, json=request))["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for prompt, choice in zip(prompts, choices):
        T = len(prompt)
        hidden_TD = model(torch.tensor(prompt), torch.arange(T), Packed(torch.tensor([0, T]))).hidden_TD
        logps_TW = model.logits(hidden_TD).float().log_softmax(-1)
        logs = choice["logprobs"]
        assert {len(values) for values in logs.values()} == {T + 1}  # and the one that was drawn
        assert logs["token_logprobs"][0] is None and logs["top_logprobs"][0] is None
        for i in range(1, T):
            own, top = logs["token_logprobs"][i], logs["top_logprobs"][i]
            assert own == pytest.approx(logps_TW[i - 1, prompt[i]].item(), abs=1e-4)
            assert own in top.values() and 1 <= len(top) <= 2
            assert (own == max(top.values())) == (logps_TW[i - 1].argmax().item() == prompt[i])  # exact, as lm-eval compares
        assert max(logs["top_logprobs"][-1].values()) == logs["token_logprobs"][-1]  # greedy
        assert choice["text"].startswith(tokenizer.decode(prompt))
    # greedy continuation scored as a prompt is greedy at every token: not chance
    drawn = ok(real.post(COMPLETIONS, json={"model": "tiny", "prompt": prompts[0], "temperature": 0, "max_tokens": 6, "logprobs": 0}))
    names = {Vocabulary(tokenizer).text(id): id for id in range(tokenizer.size)}
    continued = prompts[0] + [names[name] for name in drawn["choices"][0]["logprobs"]["tokens"]]
    logs = ok(real.post(COMPLETIONS, json=request | {"prompt": continued}))["choices"][0]["logprobs"]
    scored = list(zip(logs["token_logprobs"], logs["top_logprobs"]))[len(prompts[0]) : -1]
    assert scored and all(own == max(top.values()) for own, top in scored)


def test_max_tokens_0_only_scores(real):
    request = {"model": "tiny", "prompt": "Speak, friend", "echo": True, "logprobs": 2, "temperature": 0}
    none, one = (ok(real.post(COMPLETIONS, json=request | {"max_tokens": n}))["choices"][0] for n in (0, 1))
    assert none["text"] == "Speak, friend" and none["finish_reason"] == "length"
    for name, values in none["logprobs"].items():
        assert len(values) == len(one["logprobs"][name]) - 1
    assert none["logprobs"]["text_offset"] == [len("".join(none["logprobs"]["tokens"][:i])) for i in range(len(none["logprobs"]["tokens"]))]


def test_completions_stream_what_they_say_whole(real):
    request = {"model": "tiny", "prompt": ["Speak", "The fox"], "max_tokens": 8, "seed": 5, "n": 2, "logprobs": 1}
    whole = ok(real.post(COMPLETIONS, json=request))
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    parts = chunks(real.post(COMPLETIONS, json=request | {"stream": True, "stream_options": {"include_usage": True}}))
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        mine = [part for chunk in parts for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine][-1] == choice["finish_reason"]
        for name in ("tokens", "text_offset"):
            assert [v for part in mine for v in (part["logprobs"] or {name: []})[name]] == choice["logprobs"][name]


def test_best_of_keeps_the_likeliest(real):
    request = {"model": "tiny", "prompt": "Speak", "max_tokens": 6, "seed": 3, "logprobs": 0}
    every = ok(real.post(COMPLETIONS, json=request | {"n": 5}))["choices"]
    best = ok(real.post(COMPLETIONS, json=request | {"best_of": 5, "n": 2}))["choices"]

    def mean(choice):
        return sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["token_logprobs"])

    assert [c["text"] for c in best] == [c["text"] for c in sorted(every, key=mean, reverse=True)[:2]]
    assert [c["index"] for c in best] == [0, 1]


def test_prompts_in_every_form_are_one(real, tokenizer):
    ids = tokenizer.encode("Speak, friend")
    answers = {
        json.dumps(ok(real.post(COMPLETIONS, json={"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 5}))["choices"])
        for prompt in ("Speak, friend", ["Speak, friend"], ids, [ids])
    }
    assert len(answers) == 1


def test_infilling(scripted):
    client = scripted("x")
    request = {"model": "tiny", "prompt": "def f(", "suffix": "return 1"}
    refused = client.post(COMPLETIONS, json=request)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "suffix"
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    client = scripted("x", tokenizer=make_tokenizer(special_tokens=tokens))
    assert ok(client.post("/beta/completions", json=request))["choices"][0]["text"] == "x"
    (asked,) = client.engine.requests
    assert asked.text == "<|fim_prefix|>def f(<|fim_suffix|>return 1<|fim_middle|>"
    assert asked.params.stop_ids == (client.service.tokenizer.raw.token_to_id("<|endoftext|>"),)


# --- thinking, prefixes, tools, formats


@pytest.mark.parametrize(
    "fields, end",
    [
        ({}, "assistant\n"),
        ({"thinking": {"type": "enabled"}}, "assistant\n<think>"),
        ({"thinking": {"type": "disabled"}}, "assistant\n"),
        ({"model": "deepseek-reasoner"}, "assistant\n<think>"),
        ({"model": "deepseek-reasoner", "thinking": {"type": "disabled"}}, "assistant\n"),
        ({"model": "deepseek-reasoner", "reasoning_effort": "none"}, "assistant\n"),
        ({"model": "deepseek-chat", "chat_template_kwargs": {"enable_thinking": True}}, "assistant\n<think>"),
    ],
)
def test_thinking_is_made_true(scripted, fields, end):
    client = scripted("Yes.")
    message = ok(chat(client, **fields))["choices"][0]["message"]
    (request,) = client.engine.requests
    assert request.text.endswith(end)
    off = bool(fields) and not end.endswith("<think>")
    assert request.params.logit_bias == (((client.service.tokenizer.raw.token_to_id("<think>"), -100.0),) if off else ())
    assert ("reasoning_content" in message) == end.endswith("<think>")


def test_thinking_budgets(scripted):
    client = scripted("Yes.")
    ok(chat(client, thinking={"type": "enabled", "budget_tokens": 7, "min_tokens": 3}))
    ok(chat(client, thinking={"type": "enabled"}, reasoning_effort="low"))
    ok(chat(client, thinking={"type": "enabled"}, reasoning_effort="max"))
    first, low, most = (request.params.thinking for request in client.engine.requests)
    assert (first.max_tokens, first.min_tokens, low.max_tokens, most) == (7, 3, 1024, None)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", None])
def test_reasoning_comes_back_under_any_name_or_not(scripted, field):
    client = scripted("Yes.")
    earlier = {"role": "assistant", "content": "One.", "tool_calls": None, "refusal": None, **({field: "Because."} if field else {})}
    ok(chat(client, USER, earlier, USER))
    assert ("Because." in client.engine.requests[0].text) == (field is not None)


def test_prefix_completion(scripted):
    client = scripted("1, 2]")
    last = {"role": "assistant", "content": "[0, ", "prefix": True}
    reply = ok(client.post("/beta/chat/completions", json={"model": "tiny", "messages": [USER, last], "stop": "]"}))
    assert client.engine.requests[0].text.endswith("assistant\n[0, ")
    assert reply["choices"][0]["message"]["content"] == "1, 2" and reply["choices"][0]["finish_reason"] == "stop"
    primed = ok(chat(client, USER, last | {"content": "", "reasoning_content": "First, "}))
    assert client.engine.requests[1].text.endswith("<think>First, ")
    assert primed["choices"][0]["message"]["reasoning_content"] == "1, 2]"


def test_formats_and_forced_calls_hold_for_a_random_model(real):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    off = {"thinking": {"type": "disabled"}, "seed": 1}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    reply = ok(chat(real, response_format=form, max_tokens=400, **off))
    assert json.loads(reply["choices"][0]["message"]["content"])["a"] in (1, 2)
    reply = ok(chat(real, structured_outputs={"choice": ["red", "blue"]}, max_tokens=20, **off))
    assert reply["choices"][0]["message"]["content"] in ("red", "blue")
    named = {"type": "function", "function": {"name": "add"}}
    for choice in ("required", named):
        (answer,) = ok(chat(real, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_tokens=400, **off))["choices"]
        assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
        (call,) = answer["message"]["tool_calls"]
        assert call["type"] == "function" and json.loads(call["function"]["arguments"])["a"] in (1, 2)


def test_no_tools_no_calls(scripted):
    client = scripted(CALL)
    message = ok(chat(client, tools=[TOOL], tool_choice="none"))["choices"][0]["message"]
    assert message["content"] == CALL and "tool_calls" not in message
    assert "add" not in client.engine.requests[0].text


def test_sampling_fields_reach_the_engine(scripted):
    client = scripted("Yes.")
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2}
    fields |= {"frequency_penalty": -0.3, "seed": 7, "min_tokens": 2}
    more = {"logit_bias": {"5": -100}, "stop_token_ids": [9], "max_tokens": 99, "max_completion_tokens": 3}
    more |= {"top_logprobs": 4, "logprobs": True}
    ok(chat(client, **fields, **more, user="someone"))
    request = client.engine.requests[0]
    assert {name: getattr(request.params, name) for name in fields} == fields
    assert (request.params.max_tokens, request.params.logit_bias, request.params.stop_ids) == (3, ((5, -100.0),), (9,))
    assert request.params.logprobs == 4 and request.tenant.endswith("someone")
    ok(chat(client, top_k=-1))
    assert client.engine.requests[1].params.top_k == 0
    assert client.engine.requests[1].params.max_tokens == client.engine.max_length - len(client.engine.requests[1].prompt)


@pytest.mark.parametrize("low", [True, False])
def test_the_ends_of_every_range_draw_tokens(real, low):
    """One request's numbers must not break a step, which is everybody's."""
    ranges = {"temperature": (1e-300, 2), "top_p": (5e-324, 1), "top_k": (-1, 10**9), "min_p": (0, 1), "repetition_penalty": (0.01, 100)}
    ranges |= {"presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "seed": (-(2**63), 2**63 - 1), "min_tokens": (0, 10**9)}
    ranges |= {"max_tokens": (1, 10**12)}
    for name, (first, last) in ranges.items():
        ok(chat(real, **{"max_tokens": 4, name: first if low else last}))
    ok(chat(real, **{"max_tokens": 4} | {name: first if low else last for name, (first, last) in ranges.items()}))
    every = {str(id): -100 if low else 100 for id in range(real.service.tokenizer.size)}
    ok(chat(real, logit_bias=every, temperature=2, repetition_penalty=100, max_tokens=4))


# --- what is refused


def nested(depth):
    value: dict = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"unheard_of": 1}, "unheard_of"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER | {"mood": 1}]}, "messages[0].mood"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [USER | {"prefix": True}, USER]}, "messages[0].prefix"),
        ({"messages": [USER | {"prefix": True}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 1, "logprobs_mode": "sampled"}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"seed": 2**63}, "seed"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [TOOL] * 2}, "tools[1].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}}, "response_format"),
        ({"structured_outputs": {"choice": ["a"], "regex": "b"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "[" * 10_000}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"reasoning_effort": "heroic"}, "reasoning_effort"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1, "min_tokens": 2}}, "thinking"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": nested(80)}, None),
        ({"user_id": "x" * 513}, "user_id"),
        ({"stream_options": {"include_everything": True}}, "stream_options.include_everything"),
    ],
)
def test_bad_chats_are_refused_by_name(refusing, fields, param):
    client = refusing
    body = json.dumps({"model": "tiny", "messages": [USER], **fields})
    response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert set(error) == {"message", "type", "param", "code"} and (param is None or param.split("[")[0] in error["message"])


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [2**40]}, "prompt"),
        ({"prompt": ["x"] * 257}, "prompt"),
        ({"prompt": [1] * 5000}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": 1, "echo": True, "stream": True}, "logprobs"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"suffix": "x", "echo": True}, "suffix"),
        ({"messages": [USER]}, "messages"),
    ],
)
def test_bad_completions_are_refused_by_name(real, refusing, fields, param):
    for client in (refusing, real):
        if fields.get("prompt") == [10**9] and client is not real:
            continue  # the vocabulary is the engine's to know
        response = client.post(COMPLETIONS, json={"model": "tiny", "prompt": "Hi", **fields})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_other_refusals_have_the_same_form(scripted):
    client = scripted("x", limits=Limits(max_body_bytes=1000))
    json_type = {"content-type": "application/json"}
    for status, response in (
        (404, client.get("/nowhere")),
        (405, client.get(CHAT)),
        (404, client.get("/v1/models/gpt-4")),
        (404, client.post(CHAT, json={"model": "gpt-4", "messages": [USER]})),
        (400, client.post(CHAT, content=b"{", headers=json_type)),
        (400, client.post(CHAT, content=b"[1]", headers=json_type)),
        (400, client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"})),  # what a foreign web page could send
        (400, client.post(CHAT, content=b'{"model": "\\ud800"}', headers=json_type)),
        (413, client.post(CHAT, content=b"x" * 1001, headers=json_type)),
        (413, client.post(CHAT, content=iter([b"x" * 600] * 2), headers=json_type)),  # chunked
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert client.get("/v1/models/gpt-4").json()["error"]["code"] == "model_not_found"
    assert client.post("/anthropic/v1/messages", json={}).json()["type"] == "error"  # Anthropic's form there


@pytest.mark.parametrize("cls", [ChatBody, CompletionBody])
def test_ignored_fields_are_documented_and_taken(scripted, cls):
    client, path = scripted("x"), CHAT if cls is ChatBody else COMPLETIONS
    needed = {"messages": [USER]} if cls is ChatBody else {"prompt": "Hi"}
    ok(client.post(path, json={"model": "tiny", **needed, **{name: {"anything": [1]} for name in cls.ignored}}))
    schema = client.app.openapi()["components"]["schemas"][cls.__name__]
    assert cls.ignored.keys() <= schema["properties"].keys() and schema["additionalProperties"] is False
    assert not cls.ignored.keys() & cls.model_fields.keys()


def test_echoed_replies_are_taken(scripted):
    ok(chat(scripted("x"), USER, {"role": "assistant", "content": "x", **dict.fromkeys(ChatMessage.ignored, None)}, USER))


def test_a_slow_body_times_out():
    async def app(scope, receive, send):
        raise AssertionError("must not be reached")

    async def receive():
        await asyncio.sleep(60)

    sent = []

    async def send(message):
        sent.append(message)

    gate = Gate(app, Limits(body_timeout=0.02))
    asyncio.run(gate({"type": "http", "path": "/", "headers": []}, receive, send))
    assert sent[0]["status"] == 408 and json.loads(sent[1]["body"])["error"]["type"] == "timeout_error"


def test_json_is_bounded_before_it_is_read():
    check_json(json.dumps({"a": "[{" * 500, "b": [[1]] * 200}).encode(), 4)  # brackets in strings and beside each other are no depth
    check_json(b'"\\ud83d\\ude00"', 4)
    for bad in (json.dumps(nested(5)).encode(), b"[" * 10**6, b'"\\udead"'):
        with pytest.raises(APIError):
            check_json(bad, 4)


def test_faults_say_nothing_of_the_inside(scripted, monkeypatch, caplog):
    client = scripted("x")
    monkeypatch.setattr(type(client.service), "uptime", property(lambda self: 1 / 0))
    response = client.get("/state")
    assert response.status_code == 500 and "division" not in response.text and "division" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


# --- keys


def test_keys_and_their_limits(scripted):
    client = scripted("Yes.", keyed=True)
    _, good = client.keys.create("good")
    _, other = client.keys.create("other", models=["elsewhere"])
    _, slow = client.keys.create("slow", rate=0.05)
    row, poor = client.keys.create("poor", budget=1.0)
    time.sleep(0.02)

    def ask(headers, **fields):
        return client.post(CHAT, json={"model": "tiny", "messages": [USER], **fields}, headers=headers)

    assert ask({}).status_code == ask({"authorization": "Bearer sk-jevons-wrong"}).status_code == 401
    assert ask({"authorization": f"Bearer {good}"}).status_code == ask({"x-api-key": good}).status_code == 200
    assert ask({"x-api-key": other}).status_code == 403
    assert client.get("/v1/models", headers={"x-api-key": other}).json()["data"] == []
    first, second = ask({"x-api-key": slow}), ask({"x-api-key": slow})
    assert (first.status_code, second.status_code) == (200, 429)
    milliseconds = int(second.headers["retry-after-ms"])
    assert 0 < milliseconds <= 20_000 and int(second.headers["retry-after"]) == math.ceil(milliseconds / 1000)
    client.keys.charge(row.id, 1.5)
    assert ask({"x-api-key": poor}).status_code == 402
    balance = client.get("/user/balance", headers={"x-api-key": poor}).json()  # without being refused for it
    assert balance["is_available"] is False and float(balance["balance_infos"][0]["total_balance"]) == 0
    assert client.get("/health").status_code == 200 and client.get("/metrics").status_code == 401


def test_a_stream_holds_its_place_until_its_end(tokenizer, tmp_path):
    engine = ScriptedEngine(tokenizer, "The quick brown fox jumps over the lazy dog." * 20, step_time=0.3)
    service, keys = make_service(engine, tokenizer, tmp_path / "ledger.db", keyed=True)
    _, secret = keys.create("one", concurrency=1)
    body, headers = {"model": "tiny", "messages": [USER], "stream": True}, {"x-api-key": secret}
    with served(service, keys) as url, httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        with client.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert client.post(CHAT, json=body).status_code == 429
            engine.step_time = 0.0
            assert list(lines)[-2] == "data: [DONE]"
        assert client.post(CHAT, json=body).status_code == 200


# --- streams that do not end well


def statuses(service):
    with service.meter.store.engine.connect() as connection:
        return [row[0] for row in connection.execute(sql("SELECT status FROM usage"))]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_the_engine(tokenizer, tmp_path, streamed):
    engine = ScriptedEngine(tokenizer, "The quick brown fox. " * 1000, step_time=0.01)
    service, _ = make_service(engine, tokenizer, tmp_path / "ledger.db")
    with served(service) as url:
        hang_up(url + CHAT, {"model": "tiny", "messages": [USER], "stream": streamed}, lambda: engine.running, streamed=streamed)
        until(lambda: engine.aborted and statuses(service))
        assert engine.aborted == 1 and not engine.running and statuses(service) == ["abort"]
        assert service.under_way == 0


def test_a_full_queue_is_a_503(scripted, tokenizer):
    client = scripted("The fox. " * 20, limits=Limits(max_queue=1), step_time=0.02)
    client.service.under_way = 9  # one more than run and wait at most
    for stream in (False, True):
        response = chat(client, stream=stream)
        assert response.status_code == 503 and response.headers["retry-after"] == "1", response.text
    client.service.under_way = 0


@pytest.mark.parametrize("path, body", [(CHAT, {"messages": [USER]}), (COMPLETIONS, {"prompt": "Hi"})])
def test_an_error_in_mid_stream_is_an_event(scripted, path, body):
    client = scripted("Hello there.", step_time=0.05)
    step, count = client.engine.step, iter(range(100))

    def broken():
        if next(count) == 3:
            raise RuntimeError("secret of the engine")
        return step()

    client.engine.step = broken
    frames = client.post(path, json={"model": "tiny", "stream": True, **body}).text.strip().split("\n\n")
    error = json.loads(frames[-1].removeprefix("data: "))["error"]
    assert len(frames) > 1 and error["type"] == "server_error" and "secret" not in error["message"]
    assert statuses(client.service) == ["error"]
    assert ok(client.post(path, json={"model": "tiny", **body}))  # the engine goes on


def test_waiting_streams_are_kept_open(scripted):
    client = scripted("Yes.", limits=Limits(keep_alive=0.03), step_time=1.0)
    step = client.engine.step

    def slow_once():
        events, client.engine.step_time = step(), 0.0
        return events

    client.engine.step = slow_once
    response = chat(client, stream=True)
    assert response.text.startswith(": keep-alive\n\n") and joined(chunks(response))[0]["content"] == "Yes."


# --- the rest


def test_health_is_bad_only_where_nothing_is_answered(scripted):
    client = scripted("Yes.")
    assert ok(client.get("/health")) == {"status": "ok", "error": None}
    client.service.meter.error = "disk full"
    assert "database" in ok(client.get("/health"))["error"]
    client.service.draining = True
    assert client.get("/health").status_code == 503


def test_embeddings(real):
    ids = real.service.tokenizer.encode("Speak")
    body = {"model": "tiny", "input": ["Speak", "The fox"]}
    floats = ok(real.post("/v1/embeddings", json=body))
    packed = ok(real.post("/v1/embeddings", json=body | {"encoding_format": "base64"}))
    assert [entry["index"] for entry in floats["data"]] == [0, 1]
    for plain, coded in zip(floats["data"], packed["data"]):
        assert math.hypot(*plain["embedding"]) == pytest.approx(1, abs=1e-5)
        data = base64.b64decode(coded["embedding"])
        assert list(struct.unpack(f"<{len(data) // 4}f", data)) == pytest.approx(plain["embedding"], abs=1e-6)
    alone = ok(real.post("/v1/embeddings", json=body | {"input": ids}))
    assert alone["data"][0]["embedding"] == pytest.approx(floats["data"][0]["embedding"], abs=1e-5)
    assert alone["usage"]["prompt_tokens"] == alone["usage"]["total_tokens"] == len(ids)
    refused = real.post("/v1/embeddings", json=body | {"dimensions": 7})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "dimensions"


def test_the_tokenizer_from_afar(real, tokenizer):
    text = "Speak, friend é<|im_end|>"
    tokens = ok(real.post("/tokenize", json={"prompt": text, "add_special_tokens": False}))
    assert tokens["tokens"] == tokenizer.encode(text) and tokens["count"] == len(tokens["tokens"])
    assert ok(real.post("/detokenize", json={"tokens": tokens["tokens"]}))["prompt"] == text
    info = ok(real.get("/tokenizer_info"))
    assert info["eos_token"] == tokenizer.eos_token and info["chat_template"] == tokenizer.chat_template
    messages = ok(real.post("/tokenize", json={"messages": [USER]}))["tokens"]
    assert ok(chat(real, max_tokens=1))["usage"]["prompt_tokens"] == len(messages)


def test_models_are_listed(real):
    listed = ok(real.get("/v1/models"))
    assert listed["object"] == "list" and listed["data"][0]["id"] == "tiny"
    for entry in listed["data"]:
        assert entry == ok(real.get(f"/v1/models/{entry['id']}")) and entry["object"] == "model"
        assert ok(chat(real, model=entry["id"], max_tokens=1))["model"] == entry["id"]


def test_metrics_and_state_count(scripted):
    client = scripted("Yes.")
    usage, *_ = [ok(chat(client))["usage"] for _ in range(3)]
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert float(lines['vllm:prompt_tokens_total{model_name="tiny"}']) == 3 * usage["prompt_tokens"]
    assert float(lines['vllm:generation_tokens_total{model_name="tiny"}']) == 3 * usage["completion_tokens"]
    assert float(lines['vllm:request_success_total{finished_reason="stop",model_name="tiny"}']) == 3
    assert float(lines['vllm:time_to_first_token_seconds_count{model_name="tiny"}']) == 3
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits_total", "num_preemptions_total"):
        assert float(lines[f'vllm:{name}{{model_name="tiny"}}']) == 0
    state = ok(client.get("/state"))
    assert state["requests_today"] == 3 and state["model"] == "tiny"
    assert set(state["cache"]) == {"total_blocks", "used_blocks", "cached_blocks"}


def test_many_at_once_get_their_own_answers(scripted):
    replies = [f"Number {i}." for i in range(12)]
    client = scripted(*replies)
    got = []
    threads = [threading.Thread(target=lambda: got.append(ok(chat(client))["choices"][0]["message"]["content"])) for _ in replies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(got) == sorted(replies)


def test_the_documentation_names_every_field_limit_and_endpoint(refusing):
    text = (Path(__file__).parents[1] / "docs" / "API.md").read_text("utf-8")
    named = set(re.findall(r"`([^`\s]+)`", text))
    bodies = [ChatBody, ChatMessage, CompletionBody, EmbeddingBody, TokenizeBody, DetokenizeBody, MessageRequest, ResponseRequest]
    fields = {name for body in bodies for name in (*body.model_fields, *body.ignored)} - {"model", "input"}
    assert fields <= named | {part for name in named for part in name.split(".")}, fields - named
    for name, value in vars(Limits()).items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert "none" in row if value is None else re.search(rf"(?<![\d,]){value:,.0f}(?!,?\d)", row), (name, value, row)
    missing = [path for path in refusing.app.openapi()["paths"] if path.replace("{name}", "NAME") not in text]
    assert not missing
