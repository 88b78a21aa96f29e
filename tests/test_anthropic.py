"""/anthropic/v1/messages: streamed and whole replies are one, every stream ends once, and Anthropic's own client is content."""

import json
from types import SimpleNamespace

import anthropic
import pydantic
import pytest
import test_response
from anthropic.types import Message as AnthropicMessage
from anthropic.types import RawMessageStreamEvent
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedEngine, make_service, make_tokenizer, served
from test_response import ADD, Scripted, events, said, scripts

from jevons.data.chat import Message
from jevons.server.anthropic import MessageRequest, read
from jevons.server.app import build
from jevons.server.error import APIError
from jevons.server.job import Piece

letters, serve = test_response.letters, test_response.serve  # fixtures
ASK = {"model": "claude-opus-9", "max_tokens": 99, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "add", "description": "adds", "input_schema": ADD}
EVENT = pydantic.TypeAdapter(RawMessageStreamEvent)


@pytest.fixture(scope="module")
def server(letters):
    service = Scripted(letters)
    http = TestClient(build(service, None, page=False), raise_server_exceptions=False)

    def post(json, *script, path="/anthropic/v1/messages"):
        service.script, service.jobs, service.closed = script, [], 0
        return http.post(path, json=json, headers={"anthropic-version": "2023-06-01", "anthropic-beta": "whatever-2026"})

    return SimpleNamespace(service=service, post=post, get=http.get)


def rebuilt(stream):
    """The message that a stream's events make: deltas joined, blocks opened and closed once and in order."""
    message, texts, opened = None, [], None
    for event in stream:
        kind = event["type"]
        if kind == "message_start":
            message = event["message"]
            assert message["content"] == [] and message["stop_reason"] is None
        elif kind == "content_block_start":
            assert opened is None and event["index"] == len(texts)
            opened = event["index"]
            message["content"].append(event["content_block"])
            texts.append("")
        elif kind == "content_block_delta":
            assert event["index"] == opened
            delta, block = event["delta"], message["content"][opened]
            if delta["type"] == "signature_delta":
                block["signature"] = delta["signature"]
            elif delta["type"] == "input_json_delta":
                texts[opened] += delta["partial_json"]
            else:
                block[delta["type"].removesuffix("_delta")] += delta[delta["type"].removesuffix("_delta")]
        elif kind == "content_block_stop":
            assert event["index"] == opened
            if message["content"][opened]["type"] == "tool_use":
                message["content"][opened]["input"] = json.loads(texts[opened])
            opened = None
        elif kind == "message_delta":
            message |= event["delta"] | {"usage": message["usage"] | event["usage"]}
    assert opened is None
    return message


@settings(max_examples=30, deadline=None)
@given(script=scripts())
def test_streamed_and_whole_are_one(server, script):
    pieces, updates = script
    whole = server.post(ASK, *updates).json()
    AnthropicMessage.model_validate(whole)
    stream = list(events(server.post(ASK | {"stream": True}, *updates).text))
    for event in stream:
        if event["type"] != "ping":
            EVENT.validate_python(event)
    assert [event["type"] for event in stream if event["type"].startswith("message_")] == ["message_start", "message_delta", "message_stop"]
    assert (stream[0]["type"], stream[-1]["type"]) == ("message_start", "message_stop")
    assert rebuilt(stream) | {"id": ""} == whole | {"id": ""}
    for kind, block, key in (("content", "text", "text"), ("reasoning", "thinking", "thinking")):
        assert "".join(b[key] for b in whole["content"] if b["type"] == block) == "".join(p.text for p in pieces if p.kind == kind)
    calls = ["".join(p.text for p in pieces if p.kind == "call" and p.call == i) for i in range(len({p.id for p in pieces if p.id}))]
    assert [b["input"] for b in whole["content"] if b["type"] == "tool_use"] == [json.loads(call) for call in calls]
    # 9 tokens came and 99 were allowed: it was the context that ended
    assert (
        whole["stop_reason"]
        == {"length": "model_context_window_exceeded", "tool_calls": "tool_use", "stop": "end_turn"}[updates[-1].finish]
    )
    assert whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"] == 20


@pytest.mark.parametrize("problem", [APIError(503, "the engine has stopped"), RuntimeError("secret"), None, "abort"])
def test_every_stream_ends_once(server, problem):
    rest = [] if problem is None else [said(finish="abort")] if problem == "abort" else [problem]
    stream = list(events(server.post(ASK | {"stream": True}, said(Piece("content", "Spe"), finish=None), *rest).text))
    assert [event["type"] for event in stream if event["type"] in ("error", "message_stop")] == ["error"] == [stream[-1]["type"]]
    assert stream[-1]["error"]["type"] == ("overloaded_error" if isinstance(problem, APIError) else "api_error")
    assert "secret" not in stream[-1]["error"]["message"]
    assert server.service.closed == 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_before_the_first_token_is_a_status(server, stream):
    reply = server.post(ASK | {"stream": stream}, APIError(402, "the budget is spent"))
    assert reply.status_code == 402 and reply.json()["error"] == {"type": "billing_error", "message": "the budget is spent"}
    assert reply.json()["type"] == "error" and reply.json()["request_id"] == reply.headers["x-request-id"]


def user(*blocks):
    return [{"role": "user", "content": list(blocks)}]


@pytest.mark.parametrize(
    "field, value, param",
    [
        ("model", "gpt-17", "model"),
        ("max_tokens", None, "max_tokens"),
        ("messages", [], "messages"),
        ("messages", [{"role": "wizard", "content": "x"}], "messages[0].role"),
        ("messages", [{"role": "user"}], "messages[0].content"),
        ("messages", user({"type": "image", "source": {}}), "messages[0].content[0]"),
        ("messages", user({"type": "text"}), "messages[0].content[0].text"),
        ("messages", user({"type": "tool_result", "content": "x"}), "messages[0].content[0].tool_use_id"),
        ("messages", [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "add", "input": {}}]}], "messages[0]"),
        ("system", [{"type": "image"}], "system[0]"),
        ("tools", [{"type": "web_search_20250305", "name": "web_search"}], "tools[0].type"),
        ("tools", [{"name": "add"}], "tools[0].input_schema"),
        ("tool_choice", {"type": "any"}, "tool_choice"),
        ("tool_choice", {"type": "tool", "name": "nobody"}, "tool_choice.name"),
        ("output_config", {"effort": "heroic"}, "reasoning_effort"),
        ("output_config", {"format": {"type": "json_schema", "schema": 3}}, "output_config.format"),
        ("thinking", {"type": "sometimes"}, "thinking.type"),
        ("stop_sequences", [""], "stop_sequences"),
        ("nonsense", 1, "nonsense"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(server, field, value, param):
    reply = server.post(ASK | {field: value})
    assert reply.status_code == 400 and not server.service.jobs
    assert reply.json()["error"]["type"] == "invalid_request_error" and param in reply.json()["error"]["message"]


def test_blocks_become_turns():
    body = MessageRequest(
        model="claude",
        max_tokens=1,
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cch=1"},
            {"type": "text", "text": "You add.", "cache_control": {"type": "ephemeral"}},
        ],
        tools=[TOOL],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "text", "text": "1+1?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Call it.", "signature": "x"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "Wait."},
                    {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
                    {"type": "tool_use", "id": "t2", "name": "add", "input": {"a": 2}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "2"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "overflow", "is_error": True},
                    {"type": "text", "text": "Well?"},
                ],
            },
            {"role": "assistant", "content": "It is"},
        ],
    )
    conversation = read(body, False)
    calls = tuple({"id": f"t{i}", "type": "function", "function": {"name": "add", "arguments": {"a": i}}} for i in (1, 2))
    assert list(conversation.messages) == [
        Message("system", "You add."),
        Message("user", "Look:\n\n1+1?"),
        Message("assistant", "Wait.", "Call it.", calls),
        Message("tool", "2", tool_call_id="t1"),
        Message("tool", "Error: overflow", tool_call_id="t2"),
        Message("user", "Well?"),
        Message("assistant", "It is"),
    ]
    assert conversation.prefix and conversation.thinking is False
    assert conversation.tools == [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": ADD}}]


@pytest.mark.parametrize(
    "extra, opened, budget",
    [
        ({}, False, None),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "adaptive"}}, False, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 50}}, True, 50),
        ({"model": "deepseek-reasoner"}, True, None),
    ],
)
def test_wishes_reach_the_job(letters, server, extra, opened, budget):
    request = ASK | {"temperature": 0.5, "top_k": 4, "stop_sequences": ["END"], "metadata": {"user_id": "u"}}
    server.post(request | extra, said(Piece("content", "2")))
    (job,) = server.service.jobs
    assert (job.params.temperature, job.params.top_k, job.params.max_tokens, job.stop) == (0.5, 4, 99, ("END",))
    assert job.tenant.endswith("u") and job.reply.thinking == opened
    assert (job.params.thinking and job.params.thinking.max_tokens) == budget
    assert letters.decode(job.prompt).endswith("assistant\n<think>" if opened else "assistant\n")


def test_a_last_turn_of_the_assistants_is_continued(letters, server):
    server.post(ASK | {"messages": [*ASK["messages"], {"role": "assistant", "content": "The answer is"}]}, said(Piece("content", " 2")))
    assert letters.decode(server.service.jobs[0].prompt).endswith("assistant\nThe answer is")


def test_why_it_stopped(server):
    def reason(*pieces, **how):
        reply = server.post(ASK | {"max_tokens": how.pop("max_tokens", 99)}, said(*pieces, **how)).json()
        return reply["stop_reason"], reply["stop_sequence"]

    assert reason(Piece("content", "a")) == ("end_turn", None)
    assert reason(Piece("content", "a"), stop="END") == ("stop_sequence", "END")
    assert reason(Piece("content", "a"), finish="length", max_tokens=9) == ("max_tokens", None)


@pytest.mark.parametrize(
    "text", ['{"a": ', '{"a": NaN}', '{"a": "\\ud800"}', '{"a": ' + "[" * 10_000], ids=["cut", "nan", "surrogate", "deep"]
)
def test_arguments_that_are_no_json_still_reach_the_client(server, text):
    script = [said(Piece("call", call=0, id="c", name="add"), Piece("call", text), finish="length")]
    whole = server.post(ASK, *script).json()
    assert whole["content"] == [{"type": "tool_use", "id": "c", "name": "add", "input": {"INVALID_JSON": text}}]
    assert rebuilt(list(events(server.post(ASK | {"stream": True}, *script).text)))["content"] == whole["content"]


def test_thinking_can_be_left_out(server):
    request = ASK | {"thinking": {"type": "adaptive", "display": "omitted"}, "stream": True}
    message = rebuilt(events(server.post(request, said(Piece("reasoning", "Hm."), Piece("content", "2"))).text))
    thinking, text = message["content"]
    assert thinking["thinking"] == "" and len(thinking["signature"]) == 64 and text["text"] == "2"


KEYS = "parameters input_schema content text thinking input id name call_id output arguments summary"
KEYS += " tool_use_id tools mode schema format function strict"
WORDS = "message reasoning function_call function_call_output text thinking tool_use tool_result tool_choice allowed_tools function custom"
WORDS += " user assistant system add json_schema json_object input_text reasoning_text auto required any"
WORD = st.sampled_from(WORDS.split())
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | WORD | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS.split(), inner) | {"type": WORD, "role": WORD})
    ),
    max_leaves=16,
)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_no_body_is_our_fault(server, data):
    """Whatever stands in the fields, the answer is a reply or a 400, never a 500."""
    path, fields, least = data.draw(
        st.sampled_from(
            [
                ("/anthropic/v1/messages", "messages system tools tool_choice thinking output_config stop_sequences metadata", ASK),
                ("/v1/responses", "input instructions tools tool_choice text reasoning thinking chat_template_kwargs", test_response.ASK),
            ]
        )
    )
    chosen = data.draw(st.lists(st.sampled_from(fields.split()), min_size=1, max_size=3, unique=True))
    reply = server.post(least | {field: data.draw(ANYTHING) for field in chosen}, said(Piece("content", "2")), path=path)
    assert reply.status_code in (200, 400), reply.text


def test_models_and_counts(letters, server):
    listed = server.get("/anthropic/v1/models").json()
    assert listed["data"][0] == {"type": "model", "id": "tiny", "display_name": "tiny", "created_at": "2023-11-14T22:13:20Z"}
    counted = server.post({k: v for k, v in ASK.items() if k != "max_tokens"}, path="/anthropic/v1/messages/count_tokens").json()
    server.post(ASK, said(Piece("content", "2")))
    assert counted == {"input_tokens": len(server.service.jobs[0].prompt)}


def test_anthropics_client(letters, serve):
    script = [said(Piece("reasoning", "Add."), Piece("content", "I"), finish=None), said(Piece("content", " add."), finish=None)]
    call = [Piece("call", call=0, id="call_7", name="add"), Piece("call", '{"a":'), Piece("call", " 1}")]
    service = Scripted(letters, *script, said(*call, finish="tool_calls"))
    sdk = anthropic.Anthropic(base_url=serve(service) + "/anthropic", api_key="none", max_retries=0)
    with sdk.messages.stream(**ASK, tools=[TOOL], thinking={"type": "enabled", "budget_tokens": 1024}) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert {"thinking", "text", "input_json", "signature", "message_stop"} <= set(kinds)
    whole = sdk.messages.create(**ASK, tools=[TOOL], tool_choice={"type": "any"})
    assert [block.model_dump(exclude_none=True) for block in message.content] == [b.model_dump(exclude_none=True) for b in whole.content]
    thinking, text, call = whole.content
    assert (thinking.thinking, text.text, call.name, call.input, whole.stop_reason) == ("Add.", "I add.", "add", {"a": 1}, "tool_use")
    assert service.jobs[0].grammar is None and service.jobs[1].grammar is not None
    # the turn goes back as it came
    turns = [*ASK["messages"], {"role": "assistant", "content": whole.content}]
    turns += user({"type": "tool_result", "tool_use_id": call.id, "content": "2"})
    sdk.messages.create(**ASK | {"messages": turns}, tools=[TOOL])
    prompt = letters.decode(service.jobs[-1].prompt)
    assert '<think>Add.</think>I add.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in prompt and "tool\n2" in prompt
    assert sdk.messages.count_tokens(model="claude", messages=ASK["messages"]).input_tokens == len(
        letters.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    )
    assert next(iter(sdk.models.list())).id == "tiny"
    with pytest.raises(anthropic.BadRequestError, match="model"):
        sdk.messages.create(**ASK | {"model": "gpt-17"})


def test_from_tokens_to_both_clients(tmp_path):
    """Everything below the endpoint real but the model: thinking, a call and text come out of tokens, and the meter says what they cost."""
    import openai

    tokenizer = make_tokenizer()
    reply = 'Two of them.</think>The answer<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    service, _ = make_service(ScriptedEngine(tokenizer, reply), tokenizer, f"sqlite:///{tmp_path / 'ledger.db'}")
    with served(service, page=False) as url:
        sdk = anthropic.Anthropic(base_url=url + "/anthropic", api_key="none", max_retries=0)
        message = sdk.messages.create(**ASK, tools=[TOOL], thinking={"type": "enabled", "budget_tokens": 1024})
        tools = [{"type": "function", "name": "add", "parameters": ADD, "strict": False}]
        response = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0).responses.create(
            model="tiny", input="Hi", tools=tools, extra_body={"thinking": {"type": "enabled"}}
        )
    thinking, text, call = message.content
    assert (thinking.thinking, text.text, call.name, call.input) == ("Two of them.", "The answer", "add", {"a": 1})
    assert message.stop_reason == "tool_use"
    reasoning, answer, call = response.output
    assert (reasoning.content[0].text, answer.content[0].text) == ("Two of them.", "The answer")
    assert (call.name, json.loads(call.arguments), response.status) == ("add", {"a": 1}, "completed")
    tokens = len(tokenizer.encode(reply)) + 1
    assert message.usage.output_tokens == response.usage.output_tokens == tokens
    assert response.usage.output_tokens_details.reasoning_tokens == len(tokenizer.encode("Two of them.</think>"))
