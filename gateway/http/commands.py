"""A directory's commands: prompts with a name, from ``.opencode/command/*.md``."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any, Final, NamedTuple

from understudy.errors import InvalidInput

FOLDERS: Final = (".opencode/command", ".opencode/commands")
COMMAND_BYTES: Final = 256 * 1024
_NAME: Final = re.compile(r"[\w.-]+(/[\w.-]+)*")
_NUMBERED: Final = re.compile(r"\$(\d+)")


class Template(NamedTuple):
    name: str
    text: str
    description: str = ""
    agent: str | None = None
    model: str | None = None

    def shown(self) -> dict[str, Any]:
        hints = sorted(set(re.findall(r"\$(?:\d+|ARGUMENTS)", self.text)))
        found: dict[str, Any] = {
            "name": self.name,
            "description": self.description,
            "template": self.text,
            "source": "command",
            "hints": hints,
        }
        if self.agent is not None:
            found["agent"] = self.agent
        if self.model is not None:
            found["model"] = self.model
        return found


INIT: Final = Template(
    "init",
    "Look at this project and write AGENTS.md: what a newcomer must know to build, test and "
    "change it. Keep what is there and still true. $ARGUMENTS",
    "write AGENTS.md for this project",
)


def available(directory: str) -> list[Template]:
    """Every command of a directory, by name."""
    found = {INIT.name: INIT}
    for folder in FOLDERS:
        top = Path(directory, folder)
        there = os.path.isdir(top)  # noqa: PTH112 - false also for too long a name
        for path in sorted(top.rglob("*.md")) if there else ():
            name = path.relative_to(top).with_suffix("").as_posix()
            template = _read(name, path) if _NAME.fullmatch(name) else None
            if template is not None:
                found[name] = template
    return [found[name] for name in sorted(found)]


def find(directory: str, name: str) -> Template:
    """One command. Raises ``InvalidInput``."""
    if _NAME.fullmatch(name):
        for template in available(directory):
            if template.name == name:
                return template
    raise InvalidInput(f"there is no command {name!r:.100}", field="command")


def fill(template: Template, arguments: str) -> str:
    """The prompt: ``$ARGUMENTS`` and ``$1``, ``$2``, … replaced; else arguments come last."""
    words = arguments.split()
    if "$" not in template.text:
        return f"{template.text}\n\n{arguments}".strip()

    def numbered(match: re.Match[str]) -> str:
        place = int(match[1]) - 1
        return words[place] if 0 <= place < len(words) else ""

    return _NUMBERED.sub(numbered, template.text).replace("$ARGUMENTS", arguments).strip()


def _read(name: str, path: Path) -> Template | None:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > COMMAND_BYTES:
            return None  # a pipe would be waited for
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    head, body = _parted(text)
    return Template(
        name, body.strip(), head.get("description", ""), head.get("agent"), head.get("model")
    )


def _parted(text: str) -> tuple[dict[str, str], str]:
    """The ``key: value`` lines between two lines of dashes, and what follows them."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n?", text, re.DOTALL)
    if match is None:
        return {}, text
    pairs = (line.partition(":") for line in match[1].splitlines())
    head = {key.strip(): value.strip().strip("\"'") for key, colon, value in pairs if colon}
    return head, text[match.end() :]
