"""OpenAIModel against a server that speaks the streaming protocol, byte by byte."""

import asyncio
import json
import pickle
import subprocess
import sys
from email.utils import formatdate
from time import time

import openai
import pytest

from understudy.actors.models.configured import model_from
from understudy.actors.models.openai import OpenAIModel
from understudy.actors.models.protocol import (
    AssistantTurn,
    Finish,
    Model,
    ModelRequest,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolSpec,
    ToolUse,
    Usage,
    UserFile,
    UserText,
    UserTurn,
)
from understudy.actors.surrogates import joined
from understudy.errors import InvalidInput, ModelError, ModelOverflow, ModelUnavailable
from understudy.store.records import CacheTokens, Tokens

PNG = "data:image/png;base64,iVBORw0KGgo="


def sse(*chunks, done=True):
    lines = [c if isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in chunks]
    return "".join(f"data: {line}\n\n" for line in lines + ["[DONE]"] * done).encode()


def chunk(delta=None, finish=None, **rest):
    choice = {"index": 0, "delta": delta or {}, "logprobs": None, "finish_reason": finish}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return {**head, "choices": [choice], **rest}


def tool(index, call_id=None, name=None, arguments=None):
    function = {k: v for k, v in (("name", name), ("arguments", arguments)) if v is not None}
    delta = {"function": function}
    delta |= {} if index is None else {"index": index}
    return delta | ({} if call_id is None else {"id": call_id, "type": "function"})


def calling(*deltas):
    return sse(*(chunk({"tool_calls": [delta]}) for delta in deltas), chunk(finish="tool_calls"))


USAGE = {
    "prompt_tokens": 120,
    "completion_tokens": 30,
    "total_tokens": 150,
    "prompt_tokens_details": {"cached_tokens": 100},
    "completion_tokens_details": {"reasoning_tokens": 12},
}
HELLO = sse(
    ": a comment is not data",
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Grüße "}),
    chunk({"content": "☃!"}),
    chunk(finish="stop"),
    {**chunk(), "choices": [], "usage": USAGE},
).replace(b"data: : a comment", b": a comment")


def ask(*turns, **rest):
    turns = turns or (UserTurn((UserText("hi"),)),)
    return ModelRequest(session_id="ses_1", system="Be brief.", turns=turns, **rest)


def talk(server, *requests, base="/v1", **options):
    """Each request's events or error, from one model on ``server``."""

    async def scene():
        async with server:
            model = OpenAIModel("m", base_url=server.url + base, api_key="sk-1", **options)
            try:
                return [await outcome(model, request) for request in requests or (ask(),)]
            finally:
                await model.aclose()

    return asyncio.run(scene())


async def outcome(model, request):
    try:
        return [event async for event in model.stream(request)]
    except ModelError as error:
        return error


def test_text_and_usage_arrive_whatever_way_the_bytes_are_cut(provider, streamed):
    for split in (1, 2, 3, 7, 64, 10_000):
        server = provider(streamed(HELLO, split=split))
        assert talk(server) == [
            [
                TextDelta("Grüße "),
                TextDelta("☃!"),
                Usage(
                    Tokens(
                        total=150, input=20, output=18, reasoning=12, cache=CacheTokens(read=100)
                    )
                ),
                Finish("stop"),
            ]
        ]
        (request,) = server.requests
        assert request["path"] == "/v1/chat/completions"
        assert request["headers"]["authorization"] == "Bearer sk-1"
        assert request["body"] == {
            "model": "m",
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "hi"},
            ],
        }


def test_it_is_a_model_and_has_a_name(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    model = model_from("openai/meta/llama-3", context_limit=8192)
    assert isinstance(model, Model)
    assert (model.provider_id, model.model_id) == ("openai", "meta/llama-3")
    assert model.context_limit == 8192


def test_a_connection_is_used_again(provider, streamed):
    server = provider(streamed(HELLO))
    answers = talk(server, ask(), ask(), ask())
    assert all(answer[-1] == Finish("stop") for answer in answers)
    assert server.connections == 1


def test_a_model_serves_several_loops_and_outlives_its_close(provider, streamed):
    async def twice(model):
        for _ in range(2):
            assert (await outcome(model, ask()))[-1] == Finish("stop")
        await model.aclose()

    async def scene():
        async with provider(streamed(HELLO)) as server:
            model = OpenAIModel("m", base_url=server.url, api_key="sk-1")
            assert (await outcome(model, ask()))[-1] == Finish("stop")
            await asyncio.to_thread(lambda: asyncio.run(twice(model)))
            await twice(model)
            await twice(model)
            return server.connections

    assert asyncio.run(scene()) == 3


def test_the_whole_conversation_goes_out(provider, streamed):
    server = provider(streamed(HELLO))
    history = (
        UserTurn(
            (
                UserText("Look"),
                UserFile("image/png", PNG),
                UserFile("application/pdf", "data:application/pdf;base64,JVBERg==", "a.pdf"),
                UserFile("text/plain", "data:text/plain,a%20b", "a.txt"),
                UserFile("application/zip", "data:application/zip;base64,UEs=", "a.zip"),
                UserFile("image/png", "https://example.org/a.png"),
            )
        ),
        AssistantTurn(
            "On it.",
            (
                ToolUse("call_1", "ls", {"path": "."}, "a.txt"),
                ToolUse("call_2", "rm", {}, "no", is_error=True),
            ),
        ),
        AssistantTurn(),
        AssistantTurn("Half an ans"),
    )
    spec = ToolSpec("ls", "List files.", {"type": "object", "properties": {}})
    talk(
        server,
        ask(*history, tools=(spec,), max_output_tokens=99),
        extra={"temperature": 0},
        headers={"x-app": "1"},
    )
    body = server.requests[0]["body"]
    assert server.requests[0]["headers"]["x-app"] == "1"
    assert (body["temperature"], body["max_tokens"]) == (0, 99)
    assert body["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "ls",
                "description": "List files.",
                "parameters": {"type": "object", "properties": {}},
            },
        }
    ]
    system, user, assistant, *results, half, last = body["messages"]
    assert user["content"] == [
        {"type": "text", "text": "Look"},
        {"type": "image_url", "image_url": {"url": PNG}},
        {
            "type": "file",
            "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERg=="},
        },
        {"type": "text", "text": '<file name="a.txt" type="text/plain">\na b\n</file>'},
        {
            "type": "text",
            "text": "[a.zip (application/zip) was left out: this model cannot read it]",
        },
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    ]
    assert assistant["content"] == "On it."
    assert [c["function"]["arguments"] for c in assistant["tool_calls"]] == ['{"path":"."}', "{}"]
    assert results == [
        {"role": "tool", "tool_call_id": "call_1", "content": "a.txt"},
        {"role": "tool", "tool_call_id": "call_2", "content": "no"},
    ]
    assert half == {"role": "assistant", "content": "Half an ans"}
    assert last["role"] == "user"
    assert system["role"] == "system"


def test_parallel_calls_are_assembled_by_index(provider, streamed):
    body = calling(
        tool(0, "call_a", "ls", ""),
        tool(1, "call_b", "cat", ""),
        tool(0, arguments='{"pa'),
        tool(1, arguments='{"file": '),
        tool(0, arguments='th": "."}'),
        tool(1, arguments='"☃"}'),
    )
    assert talk(provider(streamed(body))) == [
        [
            ToolCall("call_a", "ls", '{"path": "."}'),
            ToolCall("call_b", "cat", '{"file": "☃"}'),
            Finish("tool-calls"),
        ]
    ]


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        ([tool(0, "call_a", "now")], [("now", "{}")]),
        ([tool(0, "call_a", "now", "")], [("now", "{}")]),
        ([tool(0, "a", "f", "{}"), tool(0, "b", "g", "{}")], [("f", "{}"), ("g", "{}")]),
        ([tool(0, "a", "f", "{}"), tool(0, "a", "f", "{}")], [("f", "{}"), ("f", "{}")]),
        ([tool(None, "", "f", "{}"), tool(None, "", "f", "{}")], [("f", "{}"), ("f", "{}")]),
        ([tool(0, "a", "f", '{"x'), tool(0, "a", "f", '":1}')], [("f", '{"x":1}')]),
        ([tool(0, "a", "f", "{"), tool(None, arguments="}")], [("f", "{}")]),
        ([tool(0, None, "f", "{}"), tool(1, None, "g", "{}")], [("f", "{}"), ("g", "{}")]),
        ([tool(0, "a", "f", {"x": 1})], [("f", '{"x":1}')]),
        ([tool(0, "a", "f", "{not json")], [("f", "{not json")]),
        ([tool(0, "a", "f", "[" * 3000), tool(0, "a", "f", "[")], [("f", "[" * 3001)]),
    ],
)
def test_sloppy_servers_are_understood(provider, streamed, deltas, wanted):
    ((*calls, finish),) = talk(provider(streamed(calling(*deltas))))
    assert [(c.tool, c.arguments) for c in calls] == wanted
    ids = [c.call_id for c in calls]
    assert all(ids)
    assert len(set(ids)) == len(ids)
    assert finish == Finish("tool-calls")


def test_arguments_cut_within_a_character_are_one_call(provider, streamed):
    halves = [tool(0, "a", "f", '{"x":"\ud83d'), tool(0, "a", "f", '\ude00"}')]
    chunks = [chunk({"tool_calls": [each]}) for each in halves] + [chunk(finish="tool_calls")]
    ((call, finish),) = talk(provider(streamed(sse(*map(json.dumps, chunks)))))
    assert joined(call.arguments) == '{"x":"😀"}'
    assert finish == Finish("tool-calls")


@pytest.mark.parametrize("cost", ["NaN", "Infinity", "-1", "1e999", "1e300", "1" + "0" * 400])
def test_a_cost_that_cannot_be_is_none(provider, streamed, cost):
    last = json.dumps({**chunk(finish="stop"), "usage": {**USAGE, "cost": "?"}})
    usage, _ = talk(provider(streamed(sse(last.replace('"?"', cost)))))[0]
    assert (usage.tokens.total, usage.cost) == (150, 0.0)


def test_a_call_id_of_the_history_is_not_used_again(provider, streamed):
    body = calling(tool(0, "call_0", "f", "{}"))
    history = AssistantTurn("", (ToolUse("call_0", "f", {}, "ok"),))
    ((call, _),) = talk(provider(streamed(body)), ask(UserTurn((UserText("hi"),)), history))
    assert call.call_id not in ("", "call_0")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_told_apart(provider, streamed, name):
    body = sse(chunk({name: "Hm."}), chunk({"content": "Yes."}), chunk(finish="stop"))
    assert talk(provider(streamed(body))) == [
        [ReasoningDelta("Hm."), TextDelta("Yes."), Finish("stop")]
    ]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "content-filter"),
        ("tool_calls", "other"),  # it names none
        ("something new", "other"),
    ],
)
def test_finish_reasons_are_mapped(provider, streamed, theirs, ours):
    body = sse(chunk({"content": "x"}), chunk(finish=theirs))
    assert talk(provider(streamed(body)))[0][-1] == Finish(ours)


def test_calls_finish_as_calls_though_the_server_says_stop(provider, streamed):
    body = sse(chunk({"tool_calls": [tool(0, "a", "f", "{}")]}), chunk(finish="stop"))
    assert talk(provider(streamed(body)))[0][-1] == Finish("tool-calls")


def test_a_call_cut_by_the_limit_passes_as_it_is(provider, streamed):
    body = sse(chunk({"tool_calls": [tool(0, "a", "f", "")]}), chunk(finish="length"))
    assert talk(provider(streamed(body))) == [[ToolCall("a", "f", ""), Finish("length")]]


def test_a_server_that_refuses_to_count_is_asked_once(provider, streamed, refused):
    complaint = {"error": {"message": "Unrecognized request argument: stream_options"}}
    server = provider(refused(400, complaint), streamed(HELLO))
    answers = talk(server, ask(), ask())
    assert [answer[-1] for answer in answers] == [Finish("stop")] * 2
    assert ["stream_options" in r["body"] for r in server.requests] == [True, False, False]


def error_body(message, code=None, kind="invalid_request_error"):
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


QUOTA = "You exceeded your current quota, please check your plan and billing details."


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (408, error_body("timeout"), ModelUnavailable),
        (409, error_body("conflict"), ModelUnavailable),
        (425, error_body("too early"), ModelUnavailable),
        (429, error_body("Rate limit reached", "rate_limit_exceeded", "tokens"), ModelUnavailable),
        (429, [error_body(QUOTA, 429)], ModelUnavailable),  # so says a limit per minute, too
        (429, error_body(QUOTA, "insufficient_quota", "insufficient_quota"), ModelError),
        (429, error_body("x", "billing_hard_limit_reached"), ModelError),
        (429, error_body("Request too large for m on tokens per min (TPM)"), ModelOverflow),
        (402, error_body("Insufficient Balance"), ModelError),
        (500, error_body("boom", None, "server_error"), ModelUnavailable),
        (502, b"<html>Bad Gateway</html>", ModelUnavailable),
        (503, b"", ModelUnavailable),
        (529, error_body("overloaded"), ModelUnavailable),
        (400, error_body("too long", "context_length_exceeded"), ModelOverflow),
        (
            400,
            error_body("This model's maximum context length is 8192 tokens. However, ..."),
            ModelOverflow,
        ),
        (
            400,
            error_body("the request exceeds the available context size, try increasing it"),
            ModelOverflow,
        ),
        (500, {"error": "prompt too long; exceeded max context length by 9 tokens"}, ModelOverflow),
        (413, b"", ModelOverflow),
        (400, error_body("Unknown parameter"), ModelError),
        (401, error_body("Incorrect API key", "invalid_api_key"), ModelError),
        (403, error_body("no"), ModelError),
        (404, error_body("The model `m` does not exist", "model_not_found"), ModelError),
        (422, {"detail": [{"loc": ["body", "x"], "msg": "extra fields"}]}, ModelError),
    ],
)
def test_refusals_get_their_type(provider, refused, status, body, kind):
    server = provider(refused(status, body))
    (error,) = talk(server)
    assert type(error) is kind
    assert error.status_code == status
    assert error.__cause__ is not None
    assert len(server.requests) == 1
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.data) == (kind, error.data)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry_after": "7"}, 7.0),
        ({"retry_after": "1.5"}, 1.5),
        ({"retry_after": "7", "retry_after_ms": "250"}, 0.25),
        ({"retry_after": "nonsense"}, None),
        ({"retry_after": "-3"}, None),
        ({"retry_after": "nan"}, None),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({}, None),
    ],
)
def test_the_wish_to_wait_is_told(provider, refused, headers, wait_s):
    (error,) = talk(provider(refused(429, error_body("slow down"), **headers)))
    assert type(error) is ModelUnavailable
    assert error.retry_after_s == wait_s


def test_a_date_to_wait_for_becomes_seconds(provider, refused):
    date = formatdate(time() + 60, usegmt=True)
    (error,) = talk(provider(refused(503, b"", retry_after=date)))
    assert 50 < error.retry_after_s <= 60


def test_a_server_may_say_whether_to_retry(provider, refused):
    (error,) = talk(provider(refused(429, error_body("x"), x_should_retry="false")))
    assert type(error) is ModelError
    (error,) = talk(provider(refused(400, error_body("x"), x_should_retry="true")))
    assert type(error) is ModelUnavailable


HALF = sse(chunk({"content": "Half an "}), done=False)


@pytest.mark.parametrize(
    ("body", "then", "kind"),
    [
        (HALF, "cut", ModelUnavailable),
        (HALF, "end", ModelUnavailable),
        (HALF + b"data: [DONE]\n\n", "end", ModelUnavailable),
        (HALF + b'data: {"choices": [{"delta": ', "cut", ModelUnavailable),
        (
            HALF + sse({"error": {"message": "boom", "type": "server_error"}}),
            "end",
            ModelUnavailable,
        ),
        (HALF + sse({"error": {"message": "bad gateway", "code": 502}}), "end", ModelUnavailable),
        (HALF + sse({"error": "exceeds the context window"}), "end", ModelOverflow),
        (HALF + sse({"error": {"message": "no", "code": 400}}), "end", ModelError),
        (HALF + b"data: {not json\n\n", "end", ModelError),
        (HALF + sse([1, 2]), "end", ModelError),
        (HALF + sse('"text"'), "end", ModelError),
        (HALF + sse({"choices": "abc"}), "end", ModelError),
        (HALF + sse({"choices": [{"delta": {"content": [1]}}]}), "end", ModelError),
        (HALF + sse({"choices": [{"delta": {"tool_calls": [7]}}]}), "end", ModelError),
        (HALF + b"data: \xff\xfe\n\n", "end", ModelError),
    ],
)
def test_a_stream_that_breaks_is_a_typed_error_and_what_came_is_kept(
    provider, streamed, body, then, kind
):
    said = []

    async def scene():
        async with provider(streamed(body, then=then)) as server:
            model = OpenAIModel("m", base_url=server.url, api_key="sk-1")
            try:
                async for event in model.stream(ask()):
                    said.append(event)  # noqa: PERF401 - what came before the error counts
            finally:
                await model.aclose()

    with pytest.raises(ModelError) as caught:
        asyncio.run(scene())
    assert said == [TextDelta("Half an ")]
    assert type(caught.value) is kind


def test_a_cut_behind_the_finish_does_not_matter(provider, streamed):
    body = sse(chunk({"content": "x"}), chunk(finish="stop"), done=False)
    assert talk(provider(streamed(body, then="cut"))) == [[TextDelta("x"), Finish("stop")]]


@pytest.mark.parametrize("content_type", ["text/html", "application/json"])
def test_what_is_no_stream_is_not_worth_a_retry(provider, streamed, content_type):
    (error,) = talk(provider(streamed(b"<html></html>", content_type=content_type)))
    assert type(error) is ModelError
    assert content_type in str(error)


def test_nobody_listening_is_unavailable(provider, streamed):
    async def scene():
        async with provider(streamed()) as server:
            url = server.url
        model = OpenAIModel("m", base_url=url, api_key="sk-1")
        error = await outcome(model, ask())
        await model.aclose()
        return error

    assert type(asyncio.run(scene())) is ModelUnavailable


def test_silence_beyond_the_timeout_is_unavailable(provider, streamed):
    (error,) = talk(provider(streamed(HALF, then="stall")), timeout_s=0.05)
    assert type(error) is ModelUnavailable


@pytest.mark.parametrize("body", [b"", HALF])
def test_cancelling_closes_the_connection(provider, streamed, body):
    async def scene():
        async with provider(streamed(body, then="stall")) as server:
            model = OpenAIModel("m", base_url=server.url, api_key="sk-1")
            task = asyncio.create_task(outcome(model, ask()))
            await server.stalling.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(server.hung_up.wait(), 10)
            await model.aclose()

    asyncio.run(scene())


def test_leaving_the_stream_closes_the_connection(provider, streamed):
    async def scene():
        async with provider(streamed(HALF, then="stall")) as server:
            model = OpenAIModel("m", base_url=server.url, api_key="sk-1")
            stream = model.stream(ask())
            assert await anext(stream) == TextDelta("Half an ")
            await stream.aclose()
            await asyncio.wait_for(server.hung_up.wait(), 10)
            await model.aclose()

    asyncio.run(scene())


def test_a_client_of_ones_own_stays_open(provider, streamed):
    async def scene():
        async with provider(streamed(HELLO)) as server:
            client = openai.AsyncOpenAI(base_url=server.url, api_key="own", max_retries=0)
            model = OpenAIModel("m", client=client)
            await outcome(model, ask())
            await model.aclose()
            assert not client.is_closed()
            await client.close()
            return server.requests[0]["headers"]["authorization"]

    assert asyncio.run(scene()) == "Bearer own"


def test_options_that_cannot_work_are_refused_at_once(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for options in (
        {},
        {"base_url": "localhost:8080"},
        {"api_key": "k", "timeout_s": 0},
        {"api_key": "k", "context_limit": 0},
    ):
        with pytest.raises(InvalidInput):
            OpenAIModel("m", **options)
    with pytest.raises(InvalidInput):
        OpenAIModel("", api_key="k")
    assert OpenAIModel("m", base_url="http://127.0.0.1:1/v1")  # local servers want no key


@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_without_its_package_a_model_says_what_to_install(name):
    program = f"""
import sys
sys.modules[{name!r}] = None
from understudy.actors.models.configured import model_from
from understudy.errors import ModelError
assert not {{"openai", "anthropic"}} & {{k for k, v in sys.modules.items() if v}}
try:
    model_from("{name}/m", api_key="k")
except ModelError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith(f"pip install 'understudy[{name}]'")
