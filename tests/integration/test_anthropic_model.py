"""AnthropicModel against a server that speaks the streaming protocol, byte by byte."""

import asyncio
import json

import anthropic
import pytest

from understudy.actors.models.anthropic import AnthropicModel
from understudy.actors.models.configured import model_from
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
from understudy.errors import InvalidInput, ModelError, ModelOverflow, ModelUnavailable
from understudy.store.records import CacheTokens, Tokens

CACHED = {"type": "ephemeral"}


def sse(*events):
    lines = (f"event: {e['type']}\ndata: {json.dumps(e, ensure_ascii=False)}\n\n" for e in events)
    return "".join(lines).encode()


def start(**usage):
    usage = {"input_tokens": 20, "output_tokens": 1} | usage
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": []}
    message |= {"stop_reason": None, "stop_sequence": None, "usage": usage}
    return {"type": "message_start", "message": message}


def block(index, content, *deltas):
    yield {"type": "content_block_start", "index": index, "content_block": content}
    for delta in deltas:
        yield {"type": "content_block_delta", "index": index, "delta": delta}
    yield {"type": "content_block_stop", "index": index}


def text(index, *pieces):
    deltas = ({"type": "text_delta", "text": piece} for piece in pieces)
    return block(index, {"type": "text", "text": ""}, *deltas)


def tool(index, call_id, name, *pieces):
    content = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
    deltas = ({"type": "input_json_delta", "partial_json": piece} for piece in pieces)
    return block(index, content, *deltas)


def thinking(index, signature, *pieces):
    deltas = [{"type": "thinking_delta", "thinking": piece} for piece in pieces]
    deltas.append({"type": "signature_delta", "signature": signature})
    return block(index, {"type": "thinking", "thinking": "", "signature": ""}, *deltas)


def end(reason, **usage):
    delta = {"stop_reason": reason, "stop_sequence": None}
    yield {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 30} | usage}
    yield {"type": "message_stop"}


def failing(kind, message="x"):
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}


PING = {"type": "ping"}
HELLO = sse(start(), PING, *text(0, "Grüße ", "☃!"), *end("end_turn"))
COUNTED = Usage(Tokens(total=50, input=20, output=30))
HALF = sse(start(), PING, *list(text(0, "Half an "))[:2])


def user(*words):
    return UserTurn(tuple(UserText(word) for word in words or ("hi",)))


def ask(*turns, system="Be brief.", **rest):
    return ModelRequest(session_id="ses_1", system=system, turns=turns or (user(),), **rest)


def step(*call_ids, words=""):
    return AssistantTurn(words, tuple(ToolUse(c, "ls", {"a": 1}, "out") for c in call_ids))


def talk(server, *requests, **options):
    """Each request's events or error, from one model on ``server``."""

    async def scene():
        async with server:
            model = AnthropicModel("m", base_url=server.url, api_key="sk-1", **options)
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


def key_of(request):
    """The API key: older SDKs send a header of its own, newer ones a bearer token."""
    headers = request["headers"]
    return headers.get("x-api-key") or headers["authorization"].removeprefix("Bearer ")


def body_of(provider, streamed, request, **options):
    """What goes over the wire for ``request``."""
    server = provider(streamed(HELLO, split=1000))
    assert talk(server, request, **options)[0][-1] == Finish("stop")
    return server.requests[0]["body"]


def messages_of(provider, streamed, *turns, **options):
    options = {"prompt_cache": False} | options
    return body_of(provider, streamed, ask(*turns), **options)["messages"]


def test_text_and_usage_arrive_whatever_way_the_bytes_are_cut(provider, streamed):
    for split in (1, 2, 3, 7, 64, 10_000):
        server = provider(streamed(HELLO, split=split))
        assert talk(server) == [
            [
                Usage(Tokens(total=21, input=20, output=1)),
                TextDelta("Grüße "),
                TextDelta("☃!"),
                COUNTED,
                Finish("stop"),
            ]
        ]
        (request,) = server.requests
        assert request["path"] == "/v1/messages"
        assert key_of(request) == "sk-1"
        assert request["body"] == {
            "model": "m",
            "max_tokens": 32_000,
            "stream": True,
            "system": [{"type": "text", "text": "Be brief.", "cache_control": CACHED}],
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "hi", "cache_control": CACHED}],
                }
            ],
        }


def test_it_is_a_model_and_has_a_name(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-1")
    model = model_from("anthropic/claude-x", output_limit=8192)
    assert isinstance(model, Model)
    assert (model.provider_id, model.model_id) == ("anthropic", "claude-x")
    assert model.output_limit == 8192


def test_parallel_calls_come_whole_and_invalid_json_passes(provider, streamed):
    body = sse(
        start(),
        *text(0, "Looking."),
        *tool(1, "toolu_a", "ls", "", '{"pa', 'th": "☃"}'),
        *tool(2, "toolu_b", "now"),
        *tool(3, "toolu_c", "cat", "{not json"),
        *end("tool_use"),
    )
    ((_, *events),) = talk(provider(streamed(body)))
    assert events == [
        TextDelta("Looking."),
        ToolCall("toolu_a", "ls", '{"path": "☃"}'),
        ToolCall("toolu_b", "now", "{}"),
        ToolCall("toolu_c", "cat", "{not json"),
        COUNTED,
        Finish("tool-calls"),
    ]


def test_calls_given_whole_at_the_start_are_understood(provider, streamed):
    content = {"type": "tool_use", "id": "a", "name": "ls", "input": {"x": 1}}
    body = sse(start(), *block(0, content), *end("tool_use"))
    assert ToolCall("a", "ls", '{"x":1}') in talk(provider(streamed(body)))[0]


@pytest.mark.parametrize(
    "content",
    [
        {"type": "tool_use", "name": "ls", "input": {}},
        {"type": "tool_use", "id": "a", "input": {}},
        {"type": "tool_use", "id": "a", "name": "ls", "input": {"x": "\ud800"}},
    ],
)
def test_a_call_that_lacks_something_is_a_typed_error(provider, streamed, content):
    whole = json.dumps(content)  # escaped, as half a character can only be
    body = sse(start(), *block(0, "?"), *end("tool_use")).replace(b'"?"', whole.encode())
    assert type(talk(provider(streamed(body)))[0]) is ModelError


def test_usage_counts_caches_and_thinking_apart(provider, streamed):
    body = sse(
        start(cache_read_input_tokens=100, cache_creation_input_tokens=7),
        *end(
            "end_turn",
            input_tokens=None,
            cache_read_input_tokens=None,
            output_tokens_details={"thinking_tokens": 12},
        ),
    )
    first, last, _ = talk(provider(streamed(body)))[0]
    cache = CacheTokens(read=100, write=7)
    assert first.tokens == Tokens(total=128, input=20, output=1, cache=cache)
    assert last.tokens == Tokens(total=157, input=20, output=18, reasoning=12, cache=cache)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content-filter"),
        ("pause_turn", "other"),
        ("something new", "other"),
    ],
)
def test_stop_reasons_are_mapped(provider, streamed, theirs, ours):
    body = sse(start(), *text(0, "x"), *end(theirs))
    assert talk(provider(streamed(body)))[0][-1] == Finish(ours)


def test_unknown_events_and_blocks_are_passed_over(provider, streamed):
    body = sse(
        start(),
        {"type": "new_event", "x": 1},
        *block(0, {"type": "new_block", "y": 2}, {"type": "new_delta", "z": 3}),
        *text(1, "x"),
        *end("end_turn"),
    )
    assert talk(provider(streamed(body)))[0][1:] == [TextDelta("x"), COUNTED, Finish("stop")]


def test_roles_alternate_and_results_follow_their_calls_directly(provider, streamed):
    messages = messages_of(
        provider,
        streamed,
        user("one", " ", "two"),
        user("three"),
        step("a", "b", words="On it."),
        user("by the way"),
        step("c"),
        AssistantTurn(),
        AssistantTurn("  "),
        AssistantTurn("Half an ans "),
        AssistantTurn("wer."),
        user(""),
    )
    use = {"type": "tool_use", "name": "ls", "input": {"a": 1}}
    result = {"type": "tool_result", "content": "out"}
    words = [("one", "two", "three"), ("by the way",), ("Half an ans ",), ("wer.",)]
    one, way, half, wer = [[{"type": "text", "text": w} for w in group] for group in words]
    carry_on = {"type": "text", "text": "Continue from where you stopped."}
    assert messages == [
        {"role": "user", "content": one},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "On it."}, use | {"id": "a"}, use | {"id": "b"}],
        },
        {
            "role": "user",
            "content": [result | {"tool_use_id": "a"}, result | {"tool_use_id": "b"}, *way],
        },
        {"role": "assistant", "content": [use | {"id": "c"}]},
        {"role": "user", "content": [result | {"tool_use_id": "c"}]},
        {"role": "assistant", "content": half},
        {"role": "user", "content": [carry_on]},
        {"role": "assistant", "content": wer},
        {"role": "user", "content": [carry_on]},
    ]


def test_a_conversation_starts_with_the_user_and_is_never_empty(provider, streamed):
    for turns in ((AssistantTurn("Summary."),), (user(""),), (step("a"),)):
        messages = messages_of(provider, streamed, *turns)
        assert (messages[0]["role"], messages[-1]["role"]) == ("user", "user")
        assert all(message["content"] for message in messages)


def test_call_ids_of_other_providers_are_made_fit(provider, streamed):
    messages = messages_of(provider, streamed, user(), step("call:1"), step("call:1", ""))
    uses = [b["id"] for m in messages for b in m["content"] if b["type"] == "tool_use"]
    results = [b["tool_use_id"] for m in messages for b in m["content"] if "tool_use_id" in b]
    assert uses == results == ["call_1", "call_1_1", "call"]


def test_failed_calls_are_marked(provider, streamed):
    failed = AssistantTurn("", (ToolUse("a", "ls", {}, "no such file", is_error=True),))
    messages = messages_of(provider, streamed, user(), failed)
    assert messages[-1]["content"] == [
        {"type": "tool_result", "tool_use_id": "a", "content": "no such file", "is_error": True}
    ]


def test_images_and_documents_go_out(provider, streamed):
    turn = UserTurn(
        (
            UserFile("image/png", "data:image/png;base64,iVBORw0KGgo="),
            UserFile("application/pdf", "data:application/pdf;base64,JVBERg==", "a.pdf"),
            UserFile("image/png", "https://example.org/a.png"),
            UserFile("text/plain", "data:text/plain,a%20b", "a.txt"),
            UserFile("image/png", "data:image/png;base64,@@@", "broken.png"),
            UserFile("audio/wav", "data:audio/wav;base64,AAAA", "a.wav"),
        )
    )
    assert messages_of(provider, streamed, turn)[0]["content"] == [
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
        },
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="},
        },
        {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
        {"type": "text", "text": '<file name="a.txt" type="text/plain">\na b\n</file>'},
        {
            "type": "text",
            "text": "[broken.png (image/png) was left out: this model cannot read it]",
        },
        {"type": "text", "text": "[a.wav (audio/wav) was left out: this model cannot read it]"},
    ]


def test_tools_limits_and_extras_go_out(provider, streamed):
    spec = ToolSpec("ls", "List files.", {"type": "object", "properties": {}})
    request = ask(system=" ", tools=(spec,), max_output_tokens=99)
    body = body_of(provider, streamed, request, extra={"top_k": 5})
    assert body["tools"] == [
        {
            "name": "ls",
            "description": "List files.",
            "input_schema": {"type": "object", "properties": {}},
        }
    ]
    assert (body["max_tokens"], body["top_k"]) == (99, 5)
    assert "system" not in body


THINKING = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
THOUGHT = sse(
    start(),
    *thinking(0, "signed", "Let me ", "see."),
    *block(1, {"type": "redacted_thinking", "data": "xyz"}),
    *tool(2, "a", "ls", "{}"),
    *end("tool_use"),
)


def test_thinking_goes_back_with_its_calls(provider, streamed):
    server = provider(streamed(THOUGHT), streamed(HELLO))
    first, second = talk(server, ask(), ask(user(), step("a")), extra=THINKING, prompt_cache=False)
    assert [e.text for e in first if isinstance(e, ReasoningDelta)] == ["Let me ", "see."]
    assert second[-1] == Finish("stop")
    body = server.requests[1]["body"]
    assert body["thinking"] == THINKING["thinking"]
    assert body["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": "signed"},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "tool_use", "id": "a", "name": "ls", "input": {"a": 1}},
    ]


def test_a_turn_whose_thinking_is_lost_goes_on_without(provider, streamed):
    def thinks(*turns):
        return "thinking" in body_of(provider, streamed, ask(*turns), extra=THINKING)

    assert thinks(user())
    assert thinks(user(), AssistantTurn("a"), user())
    assert thinks(user(), step("lost"), AssistantTurn("done"), user("next"))
    assert not thinks(user(), step("lost"))
    assert not thinks(user(), step("lost"), user("by the way"))


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (429, failing("rate_limit_error"), ModelUnavailable),
        (500, failing("api_error"), ModelUnavailable),
        (504, failing("timeout_error"), ModelUnavailable),
        (529, failing("overloaded_error"), ModelUnavailable),
        (502, b"<html>Bad Gateway</html>", ModelUnavailable),
        (
            400,
            failing("invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum"),
            ModelOverflow,
        ),
        (
            400,
            failing(
                "invalid_request_error",
                "input length and `max_tokens` exceed context limit: 199000 + 32000 > 200000",
            ),
            ModelOverflow,
        ),
        (413, failing("request_too_large"), ModelOverflow),
        (400, failing("invalid_request_error", "messages: roles must alternate"), ModelError),
        (
            400,
            failing("invalid_request_error", "Your credit balance is too low to access the API."),
            ModelError,
        ),
        (401, failing("authentication_error", "invalid x-api-key"), ModelError),
        (402, failing("billing_error"), ModelError),
        (403, failing("permission_error"), ModelError),
        (404, failing("not_found_error", "model: m"), ModelError),
    ],
)
def test_refusals_get_their_type(provider, refused, status, body, kind):
    server = provider(refused(status, body, retry_after="3", request_id="req_1"))
    (error,) = talk(server)
    assert type(error) is kind
    assert (error.status_code, error.request_id) == (status, "req_1")
    assert getattr(error, "retry_after_s", 3) == 3
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("tail", "then", "wanted"),
    [
        (b"", "cut", (ModelUnavailable, None)),
        (b"", "end", (ModelUnavailable, None)),
        (b'event: content_block_delta\ndata: {"ty', "cut", (ModelUnavailable, None)),
        (sse(failing("overloaded_error", "Overloaded")), "end", (ModelUnavailable, 529)),
        (sse(failing("api_error")), "end", (ModelUnavailable, 500)),
        (sse(failing("something new")), "end", (ModelUnavailable, None)),
        (sse(failing("invalid_request_error")), "end", (ModelError, 400)),
        (sse(failing("invalid_request_error", "prompt is too long")), "end", (ModelOverflow, 400)),
        (b"event: error\ndata: {not json\n\n", "end", (ModelUnavailable, None)),
        (b"event: content_block_delta\ndata: {not json\n\n", "end", (ModelError, None)),
        (sse({"type": "content_block_delta", "index": 9, "delta": {}}), "end", (ModelError, None)),
        (sse({"type": "content_block_start", "index": 1}), "end", (ModelError, None)),
        (sse({"type": "message_start", "message": 7}), "end", (ModelError, None)),
        (sse(*text(1, 7)), "end", (ModelError, None)),
        (b"event: message_delta\ndata: [1]\n\n", "end", (ModelError, None)),
    ],
)
def test_a_stream_that_breaks_is_a_typed_error_and_what_came_is_kept(
    provider, streamed, tail, then, wanted
):
    said = []

    async def scene():
        async with provider(streamed(HALF + tail, then=then)) as server:
            model = AnthropicModel("m", base_url=server.url, api_key="sk-1")
            try:
                async for event in model.stream(ask()):
                    said.append(event)  # noqa: PERF401 - what came before the error counts
            finally:
                await model.aclose()

    with pytest.raises(ModelError) as caught:
        asyncio.run(scene())
    assert said[1:] == [TextDelta("Half an ")]
    assert (type(caught.value), caught.value.data.get("status_code")) == wanted


def test_a_cut_behind_the_stop_reason_does_not_matter(provider, streamed):
    body = sse(start(), *text(0, "x"), next(iter(end("end_turn"))))
    events = talk(provider(streamed(body, then="cut")))[0]
    assert events[-2:] == [COUNTED, Finish("stop")]


def test_what_is_no_stream_is_not_worth_a_retry(provider, streamed):
    (error,) = talk(provider(streamed(b"<html></html>", content_type="text/html")))
    assert type(error) is ModelError
    assert "text/html" in str(error)


def test_silence_beyond_the_timeout_is_unavailable(provider, streamed):
    (error,) = talk(provider(streamed(HALF, then="stall")), timeout_s=0.05)
    assert type(error) is ModelUnavailable


@pytest.mark.parametrize("body", [b"", HALF])
def test_cancelling_closes_the_connection(provider, streamed, body):
    async def scene():
        async with provider(streamed(body, then="stall")) as server:
            model = AnthropicModel("m", base_url=server.url, api_key="sk-1")
            task = asyncio.create_task(outcome(model, ask()))
            await server.stalling.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(server.hung_up.wait(), 10)
            await model.aclose()

    asyncio.run(scene())


def test_a_connection_is_used_again(provider, streamed):
    server = provider(streamed(HELLO))
    assert all(answer[-1] == Finish("stop") for answer in talk(server, ask(), ask(), ask()))
    assert server.connections == 1


def test_a_client_of_ones_own_stays_open(provider, streamed):
    async def scene():
        async with provider(streamed(HELLO)) as server:
            client = anthropic.AsyncAnthropic(base_url=server.url, api_key="own", max_retries=0)
            model = AnthropicModel("m", client=client)
            await outcome(model, ask())
            await model.aclose()
            assert not client.is_closed()
            await client.close()
            return key_of(server.requests[0])

    assert asyncio.run(scene()) == "own"


def test_options_that_cannot_work_are_refused_at_once(monkeypatch, tmp_path):
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANTHROPIC_CONFIG_DIR", str(tmp_path))
    for options in (
        {},
        {"api_key": "k", "base_url": "localhost"},
        {"api_key": "k", "timeout_s": 0},
    ):
        with pytest.raises(InvalidInput):
            AnthropicModel("m", **options)
