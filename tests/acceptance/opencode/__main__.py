"""Drive OpenCode's own clients against a server: ``python -m tests.acceptance.opencode``.

Installs them with npm into a folder of its own unless UNDERSTUDY_OPENCODE_CLIENTS names one.
``python -m tests.acceptance.opencode install FOLDER`` does only that, ``… compare [EXPERIMENT …]``
runs the same experiments against OpenCode and understudy and prints what came of them, ``… web``
drives only the web app, in the Chromium that CHROMIUM names or the path has.
"""

import os
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import clients  # noqa: E402 - beside this file
import compare  # noqa: E402


def main(arguments):
    if arguments[:1] == ["install"]:
        clients.install(Path(arguments[1]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if clients.VARIABLE not in os.environ:
            clients.install(Path(folder))
            os.environ[clients.VARIABLE] = folder
        if arguments[:1] == ["compare"]:
            return compare.main(arguments[1:])
        if arguments[:1] == ["web"]:
            arguments = ["-k", "web", *arguments[1:]]
        return pytest.main(["-v", "--import-mode=importlib", str(HERE), *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
