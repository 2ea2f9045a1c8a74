"""What every provider's adapter needs to turn a request into content."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes

from understudy.actors.models.protocol import UserFile

# Several providers refuse a conversation that ends with the assistant.
CONTINUE = "Continue from where you stopped."


def data_of(url: str) -> tuple[str, str] | None:
    """The media type and the base64 text of a ``data:`` URL; None for any other or a broken one."""
    scheme, _, rest = url.partition(":")
    head, comma, payload = rest.partition(",")
    if scheme.lower() != "data" or not comma:
        return None
    mime, *parameters = head.split(";")
    raw = unquote_to_bytes(payload)
    if "base64" in parameters:
        try:
            raw = base64.b64decode(raw, validate=True)
        except binascii.Error:
            return None
    return mime or "text/plain", base64.b64encode(raw).decode()


def text_of(file: UserFile) -> str:
    """A file in words: its text if it has one, else a note that the model cannot see it.

    A note, not an error: a file that cannot be sent would refuse every later request too.
    """
    name = file.filename or "file"
    data = data_of(file.url)
    if data and (file.mime.startswith("text/") or file.mime in _TEXTUAL):
        text = base64.b64decode(data[1]).decode(errors="replace")
        return f'<file name="{name}" type="{file.mime}">\n{text}\n</file>'
    return f"[{name} ({file.mime}) was left out: this model cannot read it]"


_TEXTUAL = {"application/json", "application/xml", "application/yaml", "application/toml"}
