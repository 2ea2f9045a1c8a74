"""Run code lines from stdin, each a JSON string; answer each with one JSON line on stdout."""

import ast
import json
import os
import sys
import threading
from pathlib import Path

import cast

import understudy
from understudy import errors
from understudy.actors.models import scripted

_writing = threading.Lock()


def say(message: dict) -> None:
    line = json.dumps(message) + "\n"
    with _writing:
        sys.stdout.write(line)
        sys.stdout.flush()


def note(word: str) -> None:
    say({"note": word})


def spawn(function) -> None:
    threading.Thread(target=function, daemon=True).start()


def run(code: str, names: dict) -> object:
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<sent>", "exec"), names)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), "<sent>", "eval"), names)


def main() -> None:
    names = {
        **vars(understudy),
        **vars(scripted),
        **vars(cast),
        "errors": errors,
        "note": note,
        "os": os,
        "Path": Path,
        "signal": __import__("signal"),
        "spawn": spawn,
        "threading": threading,
    }
    for line in sys.stdin:
        try:
            value = run(json.loads(line), names)
            try:
                json.dumps(value)
            except TypeError:
                value = repr(value)
            say({"value": value})
        except BaseException as error:  # noqa: BLE001 - told to the parent
            say({"error": [type(error).__name__, str(error)]})


if __name__ == "__main__":
    main()
