"""One SDK client for each event loop: a connection pool cannot change loops."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from understudy.errors import InvalidInput, ModelError


class Closable(Protocol):
    async def close(self) -> None: ...


C = TypeVar("C", bound=Closable)


class ClientPerLoop(Generic[C]):
    """Makes clients with ``make``, the first at once, so that bad settings show at once.

    A model may serve several runtimes, one after the other or side by side: each closes its own
    loop's client, and a closed one is made anew when needed. A ``given`` client stays its owner's.
    """

    def __init__(self, make: Callable[[], C], *, given: C | None = None) -> None:
        self._make = make
        self._given = given
        self._spare = None if given is not None else make()
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, C] = WeakKeyDictionary()

    def get(self) -> C:
        """The running loop's client."""
        if self._given is not None:
            return self._given
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            spare, self._spare = self._spare, None
            client = self._clients[loop] = spare or self._make()
        return client

    async def aclose(self) -> None:
        """Close the running loop's client, if it has one."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()


def required(name: str) -> ModuleType:
    """The SDK, or a ``ModelError`` that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"the {name} package is missing: pip install 'understudy[{name}]'", package=name
        ) from error


def checked_options(
    *, model_id: str, context_limit: int, output_limit: int, base_url: str | None, timeout_s: float
) -> None:
    """Raise ``InvalidInput`` for options that no request could succeed with."""
    if not model_id:
        raise InvalidInput("model_id is empty")
    if min(context_limit, output_limit) <= 0:
        raise InvalidInput("context_limit and output_limit are numbers of tokens, above 0")
    if timeout_s <= 0:
        raise InvalidInput(f"timeout_s must be above 0, not {timeout_s!r}")
    if base_url is not None and not base_url.startswith(("http://", "https://")):
        raise InvalidInput(f"base_url must start with http:// or https://: {base_url!r}")
