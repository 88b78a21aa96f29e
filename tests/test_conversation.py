"""From a conversation to a prompt: thinking that is asked for happens, a begun answer goes on, tools are held to their schemas."""

import asyncio
from types import SimpleNamespace

import pytest

from jevons.data.chat import Message
from jevons.data.tokenizer import SPECIAL_TOKENS, train_bpe
from jevons.server import grammar
from jevons.server.conversation import EFFORTS, Conversation, read_messages, read_stop, read_tool_choice, read_tools, to_job
from jevons.server.error import APIError
from jevons.server.limit import Limits

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]"
SWITCHED = (
    TURNS + "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)  # as Qwen3's
ALWAYS = TURNS + "{{ '<think>\\n' }}{% endif %}"  # as R1's
CALLS = TURNS + "{% endif %}{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
USER = Message("user", "Hi")


def service(template, special_tokens=SPECIAL_TOKENS, **limits):
    tokenizer = train_bpe(["Speak, friend, and enter."] * 4, 320, chat_template=template, special_tokens=special_tokens)
    return SimpleNamespace(tokenizer=tokenizer, limits=Limits(**limits), engine_loop=SimpleNamespace(max_length=512))


def job(service, *messages, params=None, **wishes):
    names = ("n", "stop", "tenant")
    how = {name: wishes.pop(name) for name in names if name in wishes}
    return asyncio.run(to_job(service, Conversation(messages=messages or (USER,), **wishes), params or {}, **how))


@pytest.mark.parametrize(
    "template, thinking, ending",
    [
        (SWITCHED, None, "[assistant]"),
        (SWITCHED, False, "[assistant]<think>\n\n</think>\n\n"),
        (SWITCHED, True, "[assistant]<think>\n"),
        (ALWAYS, None, "[assistant]<think>\n"),
        (ALWAYS, True, "[assistant]<think>\n"),
        (ALWAYS, False, "[assistant]<think>\n\n</think>\n\n"),  # no switch: what was opened is closed
        (None, True, None),
    ],
)
def test_thinking_is_made_true(template, thinking, ending):
    if template is None:
        with pytest.raises(APIError, match="no chat template"):
            job(service(None), thinking=thinking)
        return
    server = service(template)
    made = job(server, thinking=thinking)
    assert server.tokenizer.decode(made.prompt) == f"[user]Hi{ending}"
    assert made.reply.thinking == ending.endswith("<think>\n")
    assert made.params.thinking is None


@pytest.mark.parametrize("template", [SWITCHED, ALWAYS])
def test_budgets(template):
    server = service(template)
    start, end = (tuple(server.tokenizer.encode(tag)) for tag in ("<think>", "</think>"))
    opened = template == ALWAYS
    bounds = job(server, thinking_budget=9).params.thinking
    assert (bounds.max_tokens, bounds.min_tokens, bounds.end_ids, bounds.start_ids) == (9, 0, end, () if opened else start)
    least = job(server, min_thinking=5)  # a minimum makes the model think
    assert least.reply.thinking and (least.params.thinking.min_tokens, least.params.thinking.start_ids) == (5, ())
    assert job(server, thinking=False, thinking_budget=9).params.thinking is None
    for effort in EFFORTS:
        low = EFFORTS[effort] == "low"
        assert (job(server, effort=effort).params.thinking is not None) == low
    # a model without the tags does not think: the wish is harmless
    plain = job(service(SWITCHED, SPECIAL_TOKENS[:3]), thinking=True, thinking_budget=9, min_thinking=3)
    assert plain.params.thinking is None and not plain.reply.thinking


@pytest.mark.parametrize(
    "template, begun, ending, inside",
    [
        (SWITCHED, Message("assistant", "It is"), "[assistant]It is", False),
        (ALWAYS, Message("assistant", "It is"), "[assistant]<think>\n\n</think>\n\nIt is", False),
        (ALWAYS, Message("assistant", "", "Let me"), "[assistant]<think>\nLet me", True),
        (SWITCHED, Message("assistant", "", "Let me"), "[assistant]<think>\nLet me", True),
        (SWITCHED, Message("assistant", "It is", "Done."), "[assistant]<think>\nDone.\n</think>\n\nIt is", False),
    ],
)
def test_an_answer_that_was_begun_goes_on(template, begun, ending, inside):
    server = service(template)
    made = job(server, USER, begun, prefix=True)
    assert server.tokenizer.decode(made.prompt) == f"[user]Hi{ending}" and made.reply.thinking == inside


def test_what_is_left_of_the_context_is_the_default():
    server = service(SWITCHED)
    made = job(server)
    assert made.params.max_tokens == 512 - len(made.prompt)
    assert job(server, params={"max_tokens": 9999}).params.max_tokens == 512 - len(made.prompt)
    assert job(service(SWITCHED, default_max_tokens=7)).params.max_tokens == 7
    long = Message("user", "x" * 600)
    with pytest.raises(APIError) as caught:
        job(server, long)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "messages", "context_length_exceeded")


TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("add", "sub")]
STRICT = [TOOLS[0], {"type": "function", "function": TOOLS[1]["function"] | {"strict": True}}]


def test_when_tools_need_a_grammar():
    server = service(CALLS, (*SPECIAL_TOKENS, "<tool_call>", "</tool_call>"))

    def made(**wishes):
        return job(server, **({"tools": TOOLS} | wishes))

    free = made()
    assert free.grammar is None and free.reply.tools == "hermes" and set(free.reply.schemas) == {"add", "sub"}
    assert '"sub"' in server.tokenizer.decode(free.prompt)
    none = made(tool_choice="none")
    assert none.grammar is None and none.reply.tools is None and "sub" not in server.tokenizer.decode(none.prompt)
    assert made(tool_choice="none", grammar=grammar.json_object()).grammar == grammar.json_object()
    sources = {made(tool_choice="required").grammar, made(tool_choice="required", parallel=False).grammar, made(tools=STRICT).grammar}
    sources |= {made(tool_choice="required", tool_name="sub").grammar, made(parallel=False).grammar}
    assert None not in sources and len(sources) == 5
    with pytest.raises(APIError, match="response_format"):
        made(grammar=grammar.json_object())
    with pytest.raises(APIError, match="no tool calls that can be read"):
        job(service(SWITCHED), tools=TOOLS)


@pytest.mark.parametrize(
    "wishes, param",
    [
        ({"n": 99}, "n"),
        ({"stop": ("x",) * 99}, "stop"),
        ({"stop": ("x" * 999,)}, "stop"),
        ({"params": {"temperature": -1.0}}, "temperature"),
        ({"effort": "heroic"}, "reasoning_effort"),
        ({"template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"tools": TOOLS * 99}, "tools"),
    ],
)
def test_refusals_name_the_field(wishes, param):
    with pytest.raises(APIError) as caught:
        job(service(SWITCHED), **wishes)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "read, value, param",
    [
        (read_messages, [], "messages"),
        (read_messages, ["x"], "messages[0]"),
        (read_messages, [{"role": "user", "content": 3}], "messages[0].content"),
        (read_messages, [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        (read_messages, [{"role": "wizard", "content": "x"}], "messages[0].role"),
        (read_messages, [{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls"),
        (read_tools, [{"type": "web_search"}], "tools[0]"),
        (read_tools, [*TOOLS, TOOLS[0]], "tools[2].function.name"),
        (read_stop, ["x", ""], "stop"),
        (lambda value: read_tool_choice(value, TOOLS), {"type": "function", "function": {"name": "mul"}}, "tool_choice"),
        (lambda value: read_tool_choice(value, []), "required", "tool_choice"),
        (lambda value: read_tool_choice(value, TOOLS), ["auto"], "tool_choice"),
    ],
)
def test_what_cannot_be_read_is_named(read, value, param):
    with pytest.raises(APIError) as caught:
        read(value)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_messages_as_clients_write_them():
    written = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}],
        },
        {"role": "assistant", "content": "2", "reasoning": "Hm."},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
    ]
    calls = ({"function": {"name": "add", "arguments": "{}"}},)
    turns = [Message("system", "Be brief."), Message("assistant", "", "Hm.", calls), Message("assistant", "2", "Hm.")]
    assert read_messages(written) == [*turns, Message("tool", "2", tool_call_id="c")]
    assert read_tool_choice(None, TOOLS) == ("auto", None) and read_tool_choice("required", TOOLS) == ("required", None)
    assert read_tool_choice({"type": "function", "function": {"name": "sub"}}, TOOLS) == ("required", "sub")
