"""What a command line asks permission for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

_OPAQUE = re.compile(r"`|\$\(|\$\{|\$'|\$\"|[<>]\(|<<|\\\n")
"""What runs or hides commands that splitting at operators would not show."""
_HARMLESS = re.compile(r"(?<=\s)\d?>&\d(?=[\s;&|]|$)|(?<=\s)\d?>\s*/dev/null(?=[\s;&|]|$)")
_PROGRAM = re.compile(r"[\w./+~-]+$")
"""A plain word: no assignment before it, no redirection, nothing the shell expands."""
_RUNS_OTHERS = frozenset(
    (
        *("if", "then", "elif", "else", "while", "until", "do", "for", "case", "time", "coproc"),
        *("eval", "exec", "command", "builtin", "env", "nohup", "sudo", "xargs"),
        *("sh", "bash", "zsh"),
    )
)
"""With any arguments, these are any command."""
_OPERATORS = frozenset("();<>|&\n")


def command_patterns(command: str) -> tuple[str, ...]:
    """The simple commands and redirections of a command line: each must be allowed.

    What cannot be split safely is one pattern, ``sh -c …``, so that no rule about ``git *``
    allows ``git log $(rm -rf .)``.
    """
    opaque = (f"sh -c {command}",)
    if _OPAQUE.search(command):
        return opaque
    lexer = shlex.shlex(_HARMLESS.sub("", command), posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace = " \t"
    lexer.commenters = ""  # a comment would hide what follows a # inside a word
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError:
        return opaque
    patterns: list[str] = []
    words: list[str] = []
    for token in tokens:
        if not _OPERATORS.issuperset(token):
            # A program called "git x" must not pass for git.
            words.append(shlex.quote(token) if not words and " " in token else token)
            continue
        patterns.append(" ".join(words))
        words = [token.strip()] if "<" in token or ">" in token else []
    patterns.append(" ".join(words))
    return tuple(dict.fromkeys(filter(None, patterns))) or opaque


def always_patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    """What "always" allows: each command with any arguments, each opaque one as it is."""
    allowed: list[str] = []
    for pattern in patterns:
        program, _, arguments = pattern.partition(" ")
        if program in _RUNS_OTHERS or not _PROGRAM.match(program):
            allowed.append(pattern)
        else:
            allowed += [f"{program} *"] if arguments else [program, f"{program} *"]
    return tuple(dict.fromkeys(allowed))
