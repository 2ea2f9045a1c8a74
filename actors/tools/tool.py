"""A tool: a typed Python function that a model may call.

    @tool(idempotent=True)
    def weather(city: Annotated[str, "in English"], days: int = 1) -> str:
        \"\"\"Look up the weather of the next days.\"\"\"

The signature is the schema, the docstring the description, and ``weather("Oslo")`` still works.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import msgspec

from understudy.actors.models.protocol import ToolSpec
from understudy.actors.surrogates import joined, storable
from understudy.actors.tools.context import DetachedContext, ToolContext
from understudy.actors.tools.signature import read_signature
from understudy.errors import InvalidInput, ToolError

MAX_OUTPUT = 50_000
"""How many characters of a result are kept when the tool does not say."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

About = Callable[..., Sequence[str]]
"""From a call's input to what it is about; in a class it gets ``self`` first."""


class ToolResult(msgspec.Struct, frozen=True):
    """What a tool may return when text alone does not say it all.

    ``output`` is for the model, ``title`` and ``metadata`` (JSON-able) are for people.
    """

    output: str
    title: str = ""
    metadata: dict[str, Any] = {}


class Tool:
    """A function with what a model, a permission rule and an executor need to know about it.

    Attributes:
        name: 1 to 64 letters, digits, ``_`` and ``-``.
        description: what the model is told.
        parameters: the JSON Schema object of the arguments.
        is_async: whether calling it gives an awaitable.
        idempotent: whether it may be run again after a crash.
        permission: the key of the permission a call needs, or None.
        timeout_s: how long a call may take, or None for the runtime's limit.
        max_output: how many characters of a result are kept.
        unbound: whether it is a method without its instance, which no model can call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        idempotent: bool = False,
        permission: str | None = None,
        timeout_s: float | None = None,
        max_output: int = MAX_OUTPUT,
        patterns: About | None = None,
        always: About | None = None,
    ) -> None:
        if not callable(function):
            raise InvalidInput(f"a tool is made from a function, not {type(function).__name__}")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise InvalidInput(f"tool {function.__name__}: a generator has no one result")
        functools.update_wrapper(self, function)
        self.name = _checked_name(name or str(getattr(function, "__name__", "")))
        signature = read_signature(function, self.name)
        self.description = signature.description if description is None else description
        self.parameters = signature.schema
        self.idempotent = idempotent
        self.permission = permission
        self.timeout_s = _positive(timeout_s, "timeout_s", self.name)
        self.max_output = _positive(max_output, "max_output", self.name, whole=True)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            type(function).__call__
        )
        self._function = function
        self._signature = signature
        self.unbound = signature.unbound
        self._patterns = patterns
        self._always = always

    def __repr__(self) -> str:
        return f"<Tool {self.name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function as it was written."""
        return self._function(*args, **kwargs)

    def __get__(self, instance: object | None, owner: type | None = None) -> Tool:
        """The tool of one instance, when a method is the tool."""
        if instance is None or not self.unbound:
            return self
        bound = copy.copy(self)
        for attribute in ("_function", "_patterns", "_always"):
            if function := getattr(self, attribute):
                setattr(bound, attribute, types.MethodType(function, instance))
        bound.unbound = False
        return bound

    def at(self, directory: str) -> Tool:
        """The tool as sessions of this directory have it: the same everywhere, if not overridden.

        Raises ``ToolError`` when it cannot work there.
        """
        return self

    def spec(self) -> ToolSpec:
        """What the model is told."""
        return ToolSpec(self.name, self.description, self.parameters)

    # --- one call, in the order of its life ---

    def raw_input(self, arguments: str) -> dict[str, Any]:
        """The arguments as the model gave them, for people; ``{"_raw": …}`` when not an object."""
        try:
            return _decode(arguments)
        except ValueError:
            return {"_raw": storable(arguments)}

    def parse(self, arguments: str) -> dict[str, Any]:
        """Check and convert the model's JSON text to keyword arguments.

        Forgives what models get wrong harmlessly: no text at all, ``"5"`` for 5, null for an
        argument that may be left out. Raises ``ToolError`` saying what to correct.
        """
        try:
            given = _decode(arguments)
        except ValueError as error:
            raise self._refusal(f"the arguments are not a JSON object: {error}") from error
        unknown = [f"`{key}`" for key in given if key not in self.parameters["properties"]]
        if unknown:
            raise self._refusal(f"unknown arguments: {', '.join(unknown)}")
        never_null = self._signature.never_null
        given = {k: v for k, v in given.items() if not (v is None and k in never_null)}
        try:
            converted = msgspec.convert(given, self._signature.arguments, strict=False)
        except (msgspec.ValidationError, RecursionError) as error:
            raise self._refusal(str(error).replace("`$.", "`")) from error
        return {key: getattr(converted, key) for key in given}

    @property
    def is_plain(self) -> bool:
        """Whether checking a call runs none of the app's own code."""
        return self._patterns is None and self._always is None

    def patterns(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        """What a permission request for this input is about: paths, commands, or ``*``.

        Raises ``ToolError`` when the tool would refuse the input anyway.
        """
        return ("*",) if self._patterns is None else _texts(self._patterns(given))

    def always(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        """The patterns that the answer "always" to such a request would allow."""
        return ("*",) if self._always is None else _texts(self._always(given))

    def invoke(self, arguments: Mapping[str, Any], context: ToolContext | None = None) -> Any:
        """Call the function with parsed arguments and the context it asks for.

        Gives what the function gives: a value, or an awaitable of one if ``is_async``.
        """
        parameter = self._signature.context
        if parameter is None or (context is None and not self._signature.context_required):
            return self._function(**arguments)
        return self._function(**arguments, **{parameter: context or DetachedContext()})

    def render(self, value: Any) -> ToolResult:
        """Turn what the function returned into a result of at most ``max_output`` characters.

        More is cut from the middle, said so, and marked ``truncated`` in the metadata. Raises
        ``ToolError`` naming the type of a value that JSON cannot express.
        """
        result = value if isinstance(value, ToolResult) else ToolResult(value)
        metadata: dict[str, Any] = {}
        if result.metadata:
            metadata = self._object(result.metadata)
        output = storable(self._text(result.output))
        if len(output) > self.max_output:
            output = cut_middle(output, self.max_output)
            metadata["truncated"] = True
        return ToolResult(output, storable(self._text(result.title)), metadata)

    # --- inside ---

    def _refusal(self, problem: str) -> ToolError:
        required = self.parameters["required"]
        takes = ", ".join(
            f"{key} ({schema.get('type', 'any')}{', required' if key in required else ''})"
            for key, schema in self.parameters["properties"].items()
        )
        return ToolError(f"{self.name}: {problem}. It takes: {takes or 'no arguments'}.")

    def _text(self, value: Any) -> str:
        if value is None:
            return ""
        return value if isinstance(value, str) else self._encoded(value).decode()

    def _object(self, value: Any) -> dict[str, Any]:
        given = msgspec.json.decode(self._encoded(value))
        if not isinstance(given, dict):
            raise ToolError(f"{self.name} returned metadata that is a {type(value).__name__}")
        return given

    def _encoded(self, value: Any) -> bytes:
        try:
            return msgspec.json.encode(value)
        except Exception as error:
            raise ToolError(
                f"{self.name} returned a {type(value).__name__} that JSON cannot express: "
                f"{words_of(error)}"
            ) from error


def cut_middle(text: str, limit: int) -> str:
    """The first and last ``limit / 2`` characters of a longer text, with a note between them."""
    head = limit - limit // 2
    note = f"\n\n[… {len(text) - limit} characters left out …]\n\n"
    return text[:head] + note + text[len(text) - limit // 2 :]


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    idempotent: bool = False,
    permission: str | None = None,
    timeout_s: float | None = None,
    max_output: int = MAX_OUTPUT,
    patterns: About | None = None,
    always: About | None = None,
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a tool of a function, a coroutine function or a method: ``@tool`` or ``@tool(…)``.

    One parameter may be annotated ``ToolContext``: it is injected and the model never sees it. A
    parameter without annotation takes anything. Options are ``Tool``'s. Raises ``InvalidInput``
    naming the function and the parameter that cannot have a schema.
    """
    if function is None:
        return functools.partial(Tool, **options)
    return Tool(function, **options)


def toolbox(tools: Iterable[Tool | Callable[..., Any]]) -> dict[str, Tool]:
    """Tools by name; plain functions become tools.

    Raises ``InvalidInput`` for two tools of one name and for a method without its instance.
    """
    if isinstance(tools, str) or not isinstance(tools, Iterable):
        raise InvalidInput("tools are a list of functions", field="tools")
    box: dict[str, Tool] = {}
    for item in tools:
        made = item if isinstance(item, Tool) else Tool(item)
        if made.unbound:
            raise InvalidInput(f"tool {made.name} is a method: pass that of an instance")
        if box.setdefault(_checked_name(made.name), made) is not made:
            raise InvalidInput(f"two tools are called {made.name}")
    return box


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} cannot be a tool's name: 1 to 64 of a-z, A-Z, 0-9, _ and -")
    return name


def _positive(number: Any, option: str, name: str, *, whole: bool = False) -> Any:
    if number is None:
        return None
    kind = int if whole else (int, float)
    if isinstance(number, bool) or not isinstance(number, kind) or not number > 0:
        raise InvalidInput(f"tool {name}: {option} must be positive, not {number!r}")
    return number


def _decode(arguments: str) -> dict[str, Any]:
    """The object in a JSON text. Raises ``ValueError`` when there is none."""
    if not arguments.strip():
        return {}
    try:
        return msgspec.json.decode(joined(arguments), type=dict[str, Any] | None) or {}
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(storable(str(value)) for value in values)


def words_of(error: BaseException) -> str:
    """What a tool's exception tells the model: a ``ToolError`` its words, others their name too."""
    words = said_by(error)
    return words if isinstance(error, ToolError) else f"{type(error).__name__}: {words}"


def said_by(error: BaseException) -> str:
    """What an exception says, as text that can be stored, whatever its ``__str__`` does."""
    try:
        return storable(str(error))
    except Exception:  # noqa: BLE001 - the class's own mistake
        return "it cannot be printed"
