"""Clients as people have them, unchanged, against a real server over a socket: openai, langchain-deepseek, lm-eval's tokenizer and scoring.

The engine is scripted, so that the model thinks, calls tools and answers in JSON when a test needs it.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from pydantic import BaseModel
from scripted import ScriptedEngine, make_service, make_tokenizer, served

openai = pytest.importorskip("openai")

USER = {"role": "user", "content": "Hi"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": PARAMETERS}}
CALL = 'Let me look.<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def server(tokenizer, tmp_path):
    """`server(*replies)`: url, engine, service and keys of a running server."""
    running = []

    def start(*replies, keyed=False, **options):
        engine = ScriptedEngine(tokenizer, *replies, **options)
        service, keys = make_service(engine, tokenizer, tmp_path / f"{len(running)}.db", keyed=keyed)
        context = served(service, keys)
        running.append(context)
        return SimpleNamespace(url=context.__enter__(), engine=engine, service=service, keys=keys)

    yield start
    for context in running:
        context.__exit__(None, None, None)


@pytest.fixture
def client(server):
    """`client(*replies)`: openai's client, and the server that it talks to."""

    def start(*replies, key="none", **options):
        running = server(*replies, **options)
        return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0), running

    return start


# --- openai


def test_openai_chat(client):
    ours, running = client("<think>Hm.</think>Hello.")
    reply = ours.chat.completions.create(model="tiny", messages=[USER], extra_body={"thinking": {"type": "enabled"}}, logprobs=True)
    (choice,) = reply.choices
    assert choice.message.content == "Hello." and choice.message.reasoning_content.endswith("Hm.")
    assert choice.finish_reason == "stop" and "".join(token.token for token in choice.logprobs.content) == "Hello."
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0 and reply.usage.prompt_tokens_details.cached_tokens == 0
    assert reply.usage.prompt_cache_miss_tokens == reply.usage.prompt_tokens
    assert reply._request_id.startswith("req_")
    # what came is sent back as it is
    ours.chat.completions.create(model="tiny", messages=[USER, choice.message, USER])
    assert "Hm." in running.engine.requests[1].text


def test_openai_stream(client):
    ours, _ = client("<think>Hm.</think>Hello.")
    chunks = list(ours.chat.completions.create(model="tiny", messages=[USER], stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant" and deltas[0].reasoning_content == ""
    assert "".join(delta.content or "" for delta in deltas) == "Hello."
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == chunks[-1].usage.total_tokens - chunks[-1].usage.prompt_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]


def test_openai_tools(client):
    ours, running = client(CALL, "It rains.")
    reply = ours.chat.completions.create(model="tiny", messages=[USER], tools=[TOOL])
    (call,) = reply.choices[0].message.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls" and reply.choices[0].message.content == "Let me look."
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Oslo"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    reply = ours.chat.completions.create(model="tiny", messages=[USER, reply.choices[0].message, result], tools=[TOOL])
    assert reply.choices[0].message.content == "It rains." and reply.choices[0].message.tool_calls is None
    assert "Oslo" in running.engine.requests[1].text and "rain" in running.engine.requests[1].text


def test_openai_streams_tools(client):
    ours, _ = client(CALL)
    with ours.chat.completions.stream(model="tiny", messages=[USER], tools=[TOOL]) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Oslo"} and call.id
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.name, json.loads(event.arguments)) for event in done] == [("weather", {"city": "Oslo"})]
    assert "".join(event.delta for event in events if event.type == "content.delta") == "Let me look."


class Weather(BaseModel):
    city: str
    rain: bool


def test_openai_parses_into_a_model(client):
    ours, running = client('{"city": "Oslo", "rain": true}')
    reply = ours.chat.completions.parse(model="tiny", messages=[USER], response_format=Weather)
    assert reply.choices[0].message.parsed == Weather(city="Oslo", rain=True)
    assert running.engine.requests[0].grammar is not None
    # what came is sent back as it is, with openai's own field `parsed`
    ours.chat.completions.create(model="tiny", messages=[USER, reply.choices[0].message.model_dump(warnings=False), USER])


def test_openai_completions(client):
    ours, _ = client("Hello.")
    reply = ours.completions.create(model="tiny", prompt=["Speak", "The"], max_tokens=4, logprobs=2, echo=True)
    assert [choice.text[:3] for choice in reply.choices] == ["Spe", "The"]
    logs = reply.choices[0].logprobs
    assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.top_logprobs) == len(logs.text_offset)
    parts = list(ours.completions.create(model="tiny", prompt="Speak", max_tokens=40, stream=True))
    assert "".join(part.choices[0].text for part in parts) == "Hello."


def test_openai_models(client):
    ours, _ = client("Hello.")
    assert ours.models.list().data[0].id == "tiny" and ours.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        ours.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_openai_errors(client):
    ours, running = client("Hello.", keyed=True)
    _, poor = running.keys.create("poor", budget=1.0)
    _, slow = running.keys.create("slow", rate=0.5)
    running.keys.charge(next(row.id for row in running.keys.store.all_keys() if row.name == "poor"), 2.0)
    running.keys.read(force=True)

    def ask(key, **fields):
        return ours.with_options(api_key=key).chat.completions.create(**{"model": "tiny", "messages": [USER]} | fields)

    with pytest.raises(openai.AuthenticationError):
        ask("sk-jevons-nobody")
    with pytest.raises(openai.APIStatusError) as caught:
        ask(poor)
    assert caught.value.status_code == 402
    ask(slow)
    with pytest.raises(openai.RateLimitError) as limited:
        ask(slow)
    assert limited.value.response.headers["retry-after"]
    _, good = running.keys.create("good")
    running.keys.read(force=True)
    with pytest.raises(openai.BadRequestError) as bad:
        ask(good, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        ask(good, model="gpt-4")


def test_openai_sees_errors_in_mid_stream(client):
    ours, running = client("Hello there.")
    step, count = running.engine.step, iter(range(100))

    def broken():
        if next(count) == 3:
            raise RuntimeError("broken on purpose")
        return step()

    running.engine.step = broken
    with pytest.raises(openai.APIError, match="engine"):
        list(ours.chat.completions.create(model="tiny", messages=[USER], stream=True))


# --- langchain-deepseek


@pytest.fixture
def langchain(server):
    """`langchain(*replies)`: ChatDeepSeek, and the server that it talks to."""
    module = pytest.importorskip("langchain_deepseek")

    def start(*replies, model="tiny", **options):
        running = server(*replies)
        return module.ChatDeepSeek(model=model, api_key="none", api_base=running.url, max_retries=0, stream_usage=True, **options), running

    return start


def test_langchain_keeps_the_reasoning(langchain):
    model, _ = langchain("Hm.</think>Hello.", model="deepseek-reasoner")
    reply = model.invoke("Hi")
    assert reply.content == "Hello." and reply.additional_kwargs["reasoning_content"] == "Hm."
    assert reply.usage_metadata["output_token_details"]["reasoning"] > 0
    total = None
    for chunk in model.stream("Hi"):
        total = chunk if total is None else total + chunk
    assert total.content == "Hello." and total.additional_kwargs["reasoning_content"] == "Hm."
    assert total.usage_metadata["total_tokens"] == reply.usage_metadata["total_tokens"]


def test_langchain_tools(langchain):
    model, running = langchain(CALL, "It rains.")
    bound = model.bind_tools([TOOL])
    reply = bound.invoke("Weather?")
    (call,) = reply.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"})
    from langchain_core.messages import HumanMessage, ToolMessage

    end = bound.invoke([HumanMessage("Weather?"), reply, ToolMessage("rain", tool_call_id=call["id"])])
    assert end.content == "It rains." and "Oslo" in running.engine.requests[1].text


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structured_output(langchain, method):
    answer = '{"city": "Oslo", "rain": true}'
    call = '<tool_call>\n{"name": "Weather", "arguments": ' + answer + "}\n</tool_call>"
    model, running = langchain(answer if method == "json_mode" else call)  # it makes a forced call of json_schema too
    assert model.with_structured_output(Weather, method=method).invoke("Weather in Oslo, as JSON?") == Weather(city="Oslo", rain=True)
    assert running.engine.requests[0].grammar is not None
