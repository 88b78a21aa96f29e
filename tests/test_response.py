"""/v1/responses: streamed and whole replies are one, every stream ends once, and openai's own client is content.

The engine is scripted here: `Scripted.answer` yields what a test wrote, so that each test is about the translation alone.
"""

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import openai
import pydantic
import pytest
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from scripted import hang_up, until

from jevons.data.chat import Message
from jevons.data.tokenizer import train_bpe
from jevons.server.app import build
from jevons.server.error import APIError
from jevons.server.job import Piece, Update, Usage
from jevons.server.limit import Limits
from jevons.server.response import ResponseRequest, read, read_input
from jevons.server.service import ALIASES

USAGE = Usage(prompt=20, cached=16, completion=9, reasoning=4)
ADD = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
ASK = {"model": "tiny", "input": "Hi"}
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)
TERMINAL = ("response.completed", "response.incomplete", "response.failed")


@pytest.fixture(scope="session")
def letters():
    return train_bpe(["Speak, friend, and enter. system user assistant tool_call"] * 4, 300)


class Scripted:
    """Stands for Service: `answer` yields the updates of `script`, and raises what exceptions it holds."""

    def __init__(self, tokenizer, *script):
        self.tokenizer, self.script, self.jobs, self.closed = tokenizer, list(script), [], 0
        self.model_id, self.created, self.limits = "tiny", 1_700_000_000, Limits(keep_alive=0.2)
        self.aliases = {alias.name: alias for alias in ALIASES}
        config = SimpleNamespace(vocab_size=tokenizer.size)
        self.engine_loop = SimpleNamespace(max_length=4096, config=config, engine=SimpleNamespace(stop_ids=frozenset()))

    async def answer(self, jobs, ticket):
        self.jobs += jobs
        try:
            for update in self.script:
                await asyncio.sleep(update if isinstance(update, float) else 0)
                if isinstance(update, Exception):
                    raise update
                if not isinstance(update, float):
                    yield update
        finally:
            self.closed += 1


@pytest.fixture(scope="module")
def server(letters):
    """A `Scripted` service and `post(json, *script)` to it, in this process."""
    service = Scripted(letters)
    http = TestClient(build(service, None, page=False), raise_server_exceptions=False)

    def post(json, *script, path="/v1/responses"):
        service.script, service.jobs, service.closed = script, [], 0
        return http.post(path, json=json)

    return SimpleNamespace(service=service, post=post)


def said(*pieces, finish="stop", stop=None):
    return Update(0, list(pieces), finish=finish, stop=stop, usage=USAGE if finish else None)


@pytest.fixture
def serve():
    """`serve(service)`: the address of a real server, over a socket."""
    running = []

    def start(service):
        server = uvicorn.Server(uvicorn.Config(build(service, None, page=False), port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(60)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)


@st.composite
def scripts(draw):
    """An answer in pieces, cut anywhere: thinking, content and calls in any order, in updates of any size, and how it ends."""
    pieces, call = [], 0
    for kind in draw(st.lists(st.sampled_from(["reasoning", "content", "call"]), max_size=5)):
        texts = draw(st.lists(TEXT, min_size=1, max_size=4))
        if kind == "call":
            arguments = json.dumps({"a": texts})
            cut = draw(st.integers(0, len(arguments)))
            pieces.append(Piece("call", call=call, id=f"call_{call}", name="add"))
            pieces += [Piece("call", text, call=call) for text in (arguments[:cut], arguments[cut:]) if text]
            call += 1
        else:
            pieces += [Piece(kind, text) for text in texts]
    updates, at = [], 0
    while at < len(pieces):
        size = draw(st.integers(1, 4))
        updates.append(said(*pieces[at : at + size], finish=None))
        at += size
    return pieces, [*updates, said(finish=draw(st.sampled_from(["length", "tool_calls" if call else "stop"])))]


def events(text):
    """(name, data) of each event of a stream."""
    frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    for frame in frames:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        yield event


def anonymous(response):
    """Without what differs from one request to the next."""
    plain = {key: value for key, value in response.items() if key not in ("id", "created_at", "completed_at", "usage")}
    return plain | {"output": [{k: v for k, v in item.items() if k != "id"} for item in response["output"]]}


@settings(max_examples=60, deadline=None)
@given(script=scripts())
def test_streamed_and_whole_are_one(server, script):
    pieces, updates = script
    whole = server.post(ASK, *updates).json()
    OpenAIResponse.model_validate(whole)
    stream = list(events(server.post(ASK | {"stream": True}, *updates).text))
    for event in stream:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    assert [event["type"] for event in stream[:2]] == ["response.created", "response.in_progress"]
    assert [event["type"] in TERMINAL for event in stream] == [False] * (len(stream) - 1) + [True]
    assert anonymous(stream[-1]["response"]) == anonymous(whole)
    assert whole["status"] == ("incomplete" if updates[-1].finish == "length" else "completed")
    deltas = {
        kind: "".join(e["delta"] for e in stream if e["type"] == f"response.{kind}.delta") for kind in ("output_text", "reasoning_text")
    }
    assert deltas["output_text"] == "".join(p.text for p in pieces if p.kind == "content")
    assert deltas["reasoning_text"] == "".join(p.text for p in pieces if p.kind == "reasoning")
    # each item is opened and closed once, before the next begins, and its deltas are its text
    order = [(e["type"].rpartition(".")[2], e["output_index"]) for e in stream if ".output_item." in e["type"]]
    assert order == [(what, i) for i in range(len(whole["output"])) for what in ("added", "done")]
    for i, item in enumerate(whole["output"]):
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert text == "".join(e["delta"] for e in stream if e.get("output_index") == i and e["type"].endswith("delta"))


@pytest.mark.parametrize("problem", [APIError(503, "the engine has stopped"), RuntimeError("secret"), None, "abort"])
def test_every_stream_ends_once(server, problem):
    rest = [] if problem is None else [said(finish="abort")] if problem == "abort" else [problem]
    stream = list(events(server.post(ASK | {"stream": True}, said(Piece("content", "Spe"), finish=None), *rest).text))
    assert [event["type"] for event in stream if event["type"] in TERMINAL] == ["response.failed"] == [stream[-1]["type"]]
    assert stream[-2]["type"] == "response.output_item.done" and stream[-2]["item"]["status"] == "incomplete"
    assert "secret" not in stream[-1]["response"]["error"]["message"]
    assert server.service.closed == 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_before_the_first_token_is_a_status(server, stream):
    reply = server.post(ASK | {"stream": stream}, APIError(503, "the queue is full", retry_after=1))
    assert reply.status_code == 503 and reply.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "field, value, param",
    [
        ("store", True, "store"),
        ("previous_response_id", "resp_1", "previous_response_id"),
        ("conversation", {"id": "c"}, "conversation"),
        ("background", True, "background"),
        ("truncation", "auto", "truncation"),
        ("top_logprobs", 2, "top_logprobs"),
        ("nonsense", 1, "nonsense"),
        ("temperature", 9, "temperature"),
        ("max_output_tokens", 0, "max_output_tokens"),
        ("tools", [{"type": "web_search"}], "tools[0].type"),
        ("tool_choice", "required", "tool_choice"),
        ("tool_choice", {"type": "function", "name": "nobody"}, "tool_choice"),
        ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": 5}, "tool_choice.tools"),
        ("reasoning", {"effort": "heroic"}, "reasoning_effort"),
        ("text", {"format": {"type": "xml"}}, "text.format"),
        ("input", [], "input"),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}], "input[0].content[0]"),
        ("input", [{"type": "item_reference", "id": "x"}], "input[0].type"),
        ("input", [{"role": "wizard", "content": "x"}], "input[0].role"),
        ("input", [{"type": "function_call", "name": "add", "arguments": "{}"}], "input[0].call_id"),
        ("model", "gpt-17", "model"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(server, field, value, param):
    reply = server.post(ASK | {field: value})
    assert reply.status_code == (404 if field == "model" else 400) and not server.service.jobs
    assert reply.json()["error"]["param"] == param and param in reply.json()["error"]["message"]


def test_items_become_turns():
    call = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "1+"}, {"type": "input_text", "text": "1?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Call it."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wait.", "annotations": []}]},
        call,
        call | {"call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "3"}]},
        {"role": "assistant", "content": "Two."},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}], "encrypted_content": "x"},
    ]
    calls = tuple({"id": id, "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}} for id in ("c1", "c2"))
    turns = [
        Message("user", "1+1?"),
        Message("assistant", "Wait.", "Call it.", calls),
        Message("tool", "2", tool_call_id="c1"),
        Message("tool", "3", tool_call_id="c2"),
        Message("assistant", "Two."),
        Message("assistant", "", "Hm."),
    ]
    assert read_input(items) == [Message("system", "Be brief."), *turns]
    body = ResponseRequest(model="tiny", input=items, instructions="You add.")
    assert list(read(body, None)[0].messages) == [Message("system", "You add.\n\nBe brief."), *turns]


def test_wishes_reach_the_job(letters, server):
    tool = {"type": "function", "name": "add", "parameters": ADD, "strict": True}
    request = ASK | {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 7, "seed": 3, "user": "u", "tools": [tool]}
    assert server.post(request, said(Piece("content", "2"))).json()["status"] == "completed"
    (job,) = server.service.jobs
    drawn = job.params
    assert (drawn.temperature, drawn.top_p, drawn.max_tokens, drawn.seed) == (0.5, 0.9, 7, 3)
    assert job.reply.tools == "hermes" and job.grammar is not None and job.tenant.endswith("u")
    assert '"add"' in letters.decode(job.prompt)
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    server.post(request | {"tools": [tool, tool | {"name": "sub"}], "tool_choice": allowed}, said(Piece("content", "2")))
    (only,) = server.service.jobs
    assert list(only.reply.schemas) == ["add"] and '"sub"' not in letters.decode(only.prompt)


@pytest.mark.parametrize(
    "extra, opened",
    [
        ({}, False),
        ({"reasoning": {"effort": "none"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"model": "deepseek-reasoner"}, True),
        ({"model": "deepseek-reasoner", "thinking": {"type": "disabled"}}, False),
        ({"model": "deepseek-reasoner", "reasoning": {"effort": "none"}}, False),
        ({"model": "deepseek-chat"}, False),
    ],
)
def test_thinking_is_made_true(letters, server, extra, opened):
    assert server.post(ASK | extra, said(Piece("content", "2"))).status_code == 200
    (job,) = server.service.jobs
    assert job.reply.thinking == opened
    assert letters.decode(job.prompt).endswith("assistant\n<think>" if opened else "assistant\n")


def test_a_thinking_budget_is_the_engines(letters, server):
    def bounds(extra):
        server.post(ASK | extra, said(Piece("content", "2")))
        return server.service.jobs[0].params.thinking

    asked, low = bounds({"thinking": {"type": "enabled", "budget_tokens": 5}}), bounds({"reasoning": {"effort": "low"}})
    end, start = letters.encode("</think>"), letters.encode("<think>")
    assert (asked.max_tokens, asked.end_ids, asked.start_ids) == (5, tuple(end), ())
    assert (low.max_tokens, low.end_ids, low.start_ids) == (1024, tuple(end), tuple(start))  # counted if the model thinks at all


class Sum(pydantic.BaseModel):
    a: int


def test_openai_client_whole_and_parsed(letters, serve):
    service = Scripted(letters, said(Piece("reasoning", "Hm."), Piece("content", '{"a"'), finish=None), said(Piece("content", ": 2}")))
    sdk = openai.OpenAI(base_url=serve(service) + "/v1", api_key="none", max_retries=0)
    response = sdk.responses.create(model="tiny", input="1+1?", instructions="Add.", reasoning={"effort": "high"})
    assert response.output_text == '{"a": 2}' and [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "Hm."
    usage = response.usage
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.input_tokens_details.cache_write_tokens) == (20, 16, 4)
    assert (usage.output_tokens, usage.output_tokens_details.reasoning_tokens, usage.total_tokens) == (9, 4, 29)
    assert sdk.responses.parse(model="tiny", input="1+1?", text_format=Sum).output_parsed == Sum(a=2)
    assert service.jobs[0].grammar is None and service.jobs[1].grammar is not None


def test_openai_client_streams_and_calls(letters, serve):
    tools = [{"type": "function", "name": "add", "description": "adds", "parameters": ADD, "strict": True}]
    call = [Piece("call", call=0, id="call_7", name="add"), Piece("call", '{"a":'), Piece("call", " 1}")]
    service = Scripted(letters, said(Piece("reasoning", "Add."), finish=None), said(*call, finish="tool_calls"))
    sdk = openai.OpenAI(base_url=serve(service) + "/v1", api_key="none", max_retries=0)
    with sdk.responses.stream(model="tiny", input="1+1?", tools=tools, tool_choice="required") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed" and "response.function_call_arguments.delta" in kinds
    call = final.output[1]
    assert (call.name, call.call_id, json.loads(call.arguments)) == ("add", "call_7", {"a": 1})
    # the output goes back as it came, with the tool's result
    items = [{"role": "user", "content": "1+1?"}, *(item.model_dump(exclude_none=True) for item in final.output)]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "2"})
    sdk.responses.create(model="tiny", input=items, tools=tools)
    prompt = letters.decode(service.jobs[-1].prompt)
    assert '<think>Add.</think><tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in prompt and "tool\n2" in prompt


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_the_work(letters, serve, stream):
    service = Scripted(letters, said(Piece("content", "a"), finish=None), 600.0, said())
    hang_up(serve(service) + "/v1/responses", ASK | {"stream": stream}, lambda: service.jobs, streamed=stream)
    until(lambda: service.closed)
    assert service.closed == 1
