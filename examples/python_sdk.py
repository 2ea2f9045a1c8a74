"""Talk to a running server with OpenCode's official Python SDK.

    understudy serve &
    pip install --pre opencode-ai
    python python_sdk.py http://127.0.0.1:4096

Without an address it starts a server of its own, for as long as it runs.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from opencode_ai import Opencode


@contextmanager
def own_server() -> Iterator[str]:
    """The address of a server on a temporary database."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "understudy", "serve", "--port", "0", "--model=scripted"]
        server = subprocess.Popen(  # noqa: S603 - ourselves
            [*command, "--database", f"{folder}/agent.db", "--directory", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with server:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found is not None, "the server says where it listens"
            try:
                yield found[0]
            finally:
                server.terminate()


def talk(url: str) -> None:
    client = Opencode(base_url=url)
    session = client.session.create(extra_body={"title": "From Python"})
    client.session.chat(
        session.id,
        provider_id="scripted",
        model_id="scripted",
        parts=[{"type": "text", "text": "What is 2 + 3?"}],
    )
    for message in client.session.messages(session.id):
        for part in message.parts:
            if part.type == "text":
                print(f"{message.info.role}: {part.text}")
    client.session.delete(session.id)
    print(f"sessions left: {sum(each.id == session.id for each in client.session.list())}")


def main() -> None:
    if sys.argv[1:]:
        talk(sys.argv[1])
    else:
        with own_server() as url:
            talk(url)


if __name__ == "__main__":
    main()
