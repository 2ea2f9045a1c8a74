"""OpenCode's own clients work against understudy, unmodified."""

import asyncio
import signal
import time
from importlib.util import find_spec

import clients
import httpx
import pytest

IDLE = "ctrl+p commands"
BUSY = "esc interrupt"


def skipped(call, *arguments):
    try:
        return call(*arguments)
    except clients.Missing as reason:
        pytest.skip(str(reason))


def test_the_javascript_sdk_of_both_generations(root, server):
    seen = skipped(clients.sdk, root, server.url, server.work)
    for name, each in seen.items():
        assert each["text"] == "You said: hello", name
        assert each["messages"] == ["user", "assistant"]
        assert each["fork"] == "flow (fork #1)"
        assert each["renamed"] == "renamed"
        assert each["missing"]["name"] == "NotFoundError"
        assert (each["children"], each["aborted"], each["removed"]) == (1, True, True)
        assert each["shell"] == "shell-hi\n"
        assert each["summarize"] is True
        assert each["gone"] == "NotFoundError"
        assert each["types"][0] == "server.connected"
        for kind in ("session.created", "session.idle", "session.compacted", "session.deleted"):
            assert kind in each["types"], (name, kind)


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ("hello", ["You said: hello"]),
        ("slow please", ["Let me see. It is done."]),
        ("run-bash please", ["echo hi-from-tool", "The tool printed hi-from-tool"]),
        ("llm-error please", ["Error", "mock provider exploded"]),
    ],
)
def test_run_attached_prints_the_whole_answer(root, server, home, words, printed):
    for _ in range(3):
        output = skipped(clients.run_attached, root, server.url, home, words)
        for each in printed:
            assert each in output


def test_run_attached_goes_on_in_a_session_and_forks_it(root, server, home):
    skipped(clients.run_attached, root, server.url, home, "hello")
    for option in (("-c",), ("-c", "--fork")):
        output = clients.run_attached(root, server.url, home, *option, "again")
        assert "You said: again" in output


def test_the_tui_prompts_runs_tools_and_aborts(tui):
    tui.until(IDLE)
    tui.type("run-bash please")
    screen = tui.until("The tool printed hi-from-tool")
    assert "$ echo hi-from-tool" in screen
    tui.until(lambda screen: BUSY not in screen)
    tui.type("long-stream please")
    tui.until("word20")
    tui.press("Escape")
    tui.until("again to interrupt")
    tui.press("Escape")
    tui.until(lambda screen: BUSY not in screen and "again to interrupt" not in screen)
    tui.type("still there")
    tui.until("You said: still there")


def test_the_tui_stops_spinning_when_a_killed_server_is_back(tui, server):
    tui.until(IDLE)
    tui.type("long-stream please")
    tui.until(lambda screen: "word20" in screen and BUSY in screen)
    server.end(signal.SIGKILL)
    server.start()
    tui.until(lambda screen: BUSY not in screen)
    tui.type("and now")
    tui.until("You said: and now")


def test_the_tui_answers_a_permission_that_waited_over_a_kill(tui, server):
    tui.until(IDLE)
    tui.type("ask-bash please")
    tui.until("Allow once")
    server.end(signal.SIGKILL)
    server.start()
    tui.until(lambda _: _asks(server))
    deadline = time.monotonic() + clients.DEADLINE_S
    while _asks(server):  # until the terminal has found its way back, Enter is lost
        assert time.monotonic() < deadline
        tui.press("Enter")
        time.sleep(1)
    tui.until("I was allowed to")


def _asks(server):
    return httpx.get(f"{server.url}/permission", trust_env=False).json()


# --- Python ------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("opencode_ai") is None, reason="opencode-ai is not installed")
def test_the_official_python_client(server):
    from opencode_ai import Opencode

    client = Opencode(base_url=server.url)
    session = client.session.create(extra_body={})
    client.session.chat(
        session.id,
        model_id="fast",
        provider_id="mock",
        parts=[{"type": "text", "text": "hello"}],
    )
    [asked, answered] = client.session.messages(session.id)
    assert (asked.info.role, answered.info.role) == ("user", "assistant")
    assert [each.id for each in client.session.list()] == [session.id]
    assert client.session.abort(session.id) is True
    assert client.session.delete(session.id) is True


@pytest.mark.skipif(find_spec("opencode_sdk") is None, reason="opencode-sdk is not installed")
def test_the_python_client_opencode_sdk(server):
    from opencode_sdk.client import OpencodeClient

    client = OpencodeClient(base_url=server.url)
    session = client.create_session(title="from Python")
    client.send_message(session["id"], "hello")
    assert [each["title"] for each in client.list_sessions()] == ["from Python"]
    assert len(client.list_messages(session["id"])) == 2


def test_the_python_client_opencode_py(server):
    opencode = pytest.importorskip("opencode._client", reason="opencode-py is not installed")

    client = opencode.OpencodeClient(base_url=server.url)
    session = client.session_create(title="from Python")
    client.session_send(session.id, {"parts": [{"type": "text", "text": "hello"}]})
    assert len(client.session_messages(session.id)) == 2
    assert client.session_fork(session.id).title == "from Python (fork #1)"
    assert client.session_summarize(session.id) is True
    assert (client.session_todo(session.id), client.session_diff(session.id)) == ([], [])
    assert [each.name for each in client.app_agents()] == ["build"]
    (server.work / "a.txt").write_text("found me")
    assert client.file_read("a.txt").content == "found me"
    assert client.find_files("a") == ["a.txt"]
    assert len(client.find_text("found")) == 1
    assert client.session_delete(session.id) is True


@pytest.mark.skipif(find_spec("opencode_agent_sdk") is None, reason="it is not installed")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaks sockets
def test_the_python_client_opencode_agent_sdk(server):
    from opencode_agent_sdk import AgentOptions, SDKClient

    async def ask():
        options = AgentOptions(model="fast", provider_id="mock", server_url=server.url)
        client = SDKClient(options)
        await client.connect()
        await client.query("run-bash please")
        found = [each async for each in client.receive_response()]
        await client.disconnect()
        return repr(found)

    told = asyncio.run(ask())
    for words in ("echo hi-from-tool", "The tool printed hi-from-tool"):
        assert words in told
