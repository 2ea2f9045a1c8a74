"""OpenCode's web app, in a headless Chromium, works against understudy, over two kills.

Its page is served by OpenCode itself, all its calls are ours. UNDERSTUDY_PICTURES names a folder
for what it looked like.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import clients
import httpx
import pytest
from contenders import OpenCode

HERE = Path(__file__).parent


@pytest.fixture
def browser(root):
    found = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if found is None or not (root / "node_modules" / "playwright-core").is_dir():
        pytest.skip("chromium, or playwright-core, is not here")
    return found


@pytest.fixture
def assets(root, tmp_path):
    """A server of OpenCode's that has the page; its model is never asked."""
    try:
        clients.binary(root)
    except clients.Missing as reason:
        pytest.skip(str(reason))
    page = OpenCode(tmp_path / "opencode", "http://127.0.0.1:9/v1")
    page.start()
    yield page.url
    page.kill()
    page.client.close()


def test_the_web_app_streams_asks_deletes_and_outlives_kills(
    root, server, browser, assets, tmp_path
):
    pictures = Path(os.environ.get("UNDERSTUDY_PICTURES", tmp_path / "pictures"))
    pictures.mkdir(parents=True, exist_ok=True)
    words = [shutil.which("node"), HERE / "web.mjs", server.url, assets, server.work, browser]
    with (tmp_path / "web.err").open("w+") as errors:
        page = subprocess.Popen(
            [*words, pictures],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        seen = {}
        with page:
            for line in page.stdout:
                told = json.loads(line)
                if told.get("do") == "kill":
                    server.end(signal.SIGKILL)
                    server.start()
                    page.stdin.write("\n")
                    page.stdin.flush()
                else:
                    seen[told["saw"]] = told
        errors.seek(0)
        assert page.returncode == 0, (list(seen), errors.read())
    assert seen["streaming"]["grew"]
    assert seen["recovered"]["kept"]
    assert seen["deleted"]["errors"] == []
    gone = seen["deleted"]["session"]
    listed = httpx.get(f"{server.url}/session", trust_env=False).json()
    assert gone not in [each["id"] for each in listed]
