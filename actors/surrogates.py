"""Halves of characters: what UTF-16 has and UTF-8 cannot express.

JSON escapes a character beyond the first 65,536 as two surrogates, and a provider may cut its
answer between them.
"""

from __future__ import annotations

_HIGH = ("\ud800", "\udbff")


def joined(text: str) -> str:
    """The text, with every pair of surrogates as the one character that it stands for."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def storable(text: str) -> str:
    """The text as UTF-8 can express it: pairs of surrogates joined, lone ones replaced."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return joined(text).encode("utf-8", "replace").decode()
    return text


def cut_half(text: str) -> tuple[str, str]:
    """The text without the first half of a pair at its end, and that half, or ""."""
    if text and _HIGH[0] <= text[-1] <= _HIGH[1]:
        return text[:-1], text[-1]
    return text, ""
