"""Identifiers: OpenCode's scheme, made from a time, a counter and entropy given by the caller.

``<prefix>_`` + 12 hex digits of ``milliseconds * 4096 + counter`` + 14 letters and digits.
Session ids count down, so that the newest sorts first. Ids are identity only: order is ``seq``.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from typing import Final

from understudy.errors import InvalidInput

_PLAIN: Final = bytes.maketrans(b"+/", b"Az")
_MASK: Final = (1 << 48) - 1
_SPREAD: Final = 0x9E3779B97F4A7C15F39CC0605CEDC835  # odd: distinct counters stay distinct
_SHAPE: Final = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def make_id(prefix: str, *, now_ms: int, counter: int, entropy: int) -> str:
    """The id for this moment; the same arguments give the same id."""
    stamp = (now_ms * 4096 + (counter & 0xFFF)) & _MASK
    if prefix == "ses":
        stamp ^= _MASK
    value = (entropy + (counter + 1) * _SPREAD) & ((1 << 96) - 1)
    digits = b2a_base64(value.to_bytes(12, "big"), newline=False).translate(_PLAIN)
    return f"{prefix}_{stamp:012x}{digits[:14].decode()}"


def check_id(kind: str, value: object) -> str:
    """``value`` as an id given by a caller, or ``InvalidInput``."""
    if not isinstance(value, str) or _SHAPE.fullmatch(value) is None:
        raise InvalidInput(
            f"{kind} must be 1 to 128 characters of A-Z a-z 0-9 _ . : -, not {value!r:.60}",
            field=kind,
        )
    return value
