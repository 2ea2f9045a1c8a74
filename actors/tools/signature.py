"""What a function's signature says about the arguments a model may give it.

A signature becomes a msgspec struct, which checks and converts the model's JSON, and a JSON
Schema object, which tells the model what to send. Everything impossible is refused here, when
the tool is made, and never when a model calls it.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from understudy.actors.tools.context import ToolContext
from understudy.errors import InvalidInput

_SECTION = re.compile(
    r"^(?:Args|Arguments|Parameters):[ \t]*\n((?:[ \t]+\S.*\n?|[ \t]*\n)*)", re.MULTILINE
)
_ENTRY = re.compile(r"^(\w+)[^:\n]*:(.*(?:\n(?:[ \t].*)?)*)", re.MULTILINE)


class Signature(msgspec.Struct, frozen=True):
    """What a tool takes.

    Attributes:
        arguments: the struct that holds converted arguments; what was not given is ``UNSET``.
        schema: the JSON Schema object of the arguments.
        never_null: optional arguments whose type has no room for ``null``.
        context: the name of the parameter that takes the ``ToolContext``, or None.
        context_required: whether the function cannot be called without its context.
        unbound: whether the function is a method that has no instance yet.
        description: the docstring without its section of arguments.
    """

    arguments: type[msgspec.Struct]
    schema: dict[str, Any]
    never_null: frozenset[str]
    context: str | None
    context_required: bool
    unbound: bool
    description: str


def read_signature(function: Callable[..., Any], name: str) -> Signature:
    """Read what ``function`` takes. Raises ``InvalidInput`` naming the parameter that cannot be."""
    parameters = list(_parameters(function, name))
    unbound = bool(parameters) and _is_self(function, parameters[0])
    description, documented = split_docstring(inspect.getdoc(function) or "")
    namespace = _namespace(function)
    annotations: dict[str, Any] = {}
    optional: dict[str, Any] = {}
    context: inspect.Parameter | None = None
    for parameter in parameters[unbound:]:
        _refuse_kind(parameter, name)
        annotation = _resolve(parameter, namespace, name)
        if _is_context(annotation):
            if context is not None:
                raise InvalidInput(f"tool {name}: more than one parameter takes the ToolContext")
            context = parameter
            continue
        _refuse_type(annotation, parameter, name)
        annotations[parameter.name] = annotation
        if parameter.default is not parameter.empty:
            optional[parameter.name] = parameter.default
        documented |= _annotated_description(parameter.name, annotation)
    arguments = _struct(name, annotations, optional)
    return Signature(
        arguments=arguments,
        schema=_schema(arguments, optional, documented),
        never_null=frozenset(key for key in optional if not _takes_none(annotations[key])),
        context=context.name if context else None,
        context_required=context is not None and context.default is context.empty,
        unbound=unbound,
        description=description,
    )


def split_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """Split a Google-style docstring into its prose and its descriptions of arguments."""
    section = _SECTION.search(docstring)
    if section is None:
        return docstring.strip(), {}
    prose = docstring[: section.start()].rstrip() + "\n\n" + docstring[section.end() :].lstrip()
    entries = _ENTRY.finditer(textwrap.dedent(section[1]))
    return prose.strip(), {entry[1]: " ".join(entry[2].split()) for entry in entries}


# --- parameters --------------------------------------------------------------------------------


def _parameters(function: Callable[..., Any], name: str) -> typing.Iterable[inspect.Parameter]:
    try:
        return inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"tool {name}: its signature cannot be read: {error}") from error


def _is_self(function: Callable[..., Any], first: inspect.Parameter) -> bool:
    """Whether this is a method as its class body sees it: ``self`` first, and not annotated."""
    return inspect.isfunction(function) and first.name == "self" and first.annotation is first.empty


def _refuse_kind(parameter: inspect.Parameter, name: str) -> None:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise InvalidInput(f"tool {name}: {parameter} has no schema; name every parameter")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise InvalidInput(f"tool {name}: {parameter.name} is positional-only; tools take names")


def _refuse_type(annotation: Any, parameter: inspect.Parameter, name: str) -> None:
    try:
        msgspec.json.schema_components((annotation,))
        msgspec.json.Decoder(annotation)  # finds the unions that msgspec cannot tell apart
    except Exception as error:
        # Whatever an annotation makes msgspec raise, the fault is the annotation's.
        reason = str(error).strip().rsplit("\n", 1)[-1]
        raise InvalidInput(
            f"tool {name}: parameter {parameter.name} has no JSON schema: {reason}",
            parameter=parameter.name,
        ) from error


def _namespace(function: Callable[..., Any]) -> dict[str, Any]:
    """Where the function's annotations are evaluated; ``ToolContext`` needs no import there."""
    target: Any = function
    while isinstance(target, functools.partial):
        target = target.func
    target = inspect.unwrap(target)
    if not inspect.isroutine(target):
        target = type(target).__call__
    return {"ToolContext": ToolContext, **getattr(target, "__globals__", {})}


def _resolve(parameter: inspect.Parameter, namespace: dict[str, Any], name: str) -> Any:
    """The parameter's type; what has no annotation takes anything."""
    if parameter.annotation is parameter.empty:
        return Any
    holder = type("_Holder", (), {"__annotations__": {"it": parameter.annotation}})
    try:
        return typing.get_type_hints(holder, globalns=namespace, include_extras=True)["it"]
    except Exception as error:
        # An annotation is an expression of the app's: it may raise anything.
        raise InvalidInput(
            f"tool {name}: the annotation of {parameter.name} cannot be evaluated: {error}",
            parameter=parameter.name,
        ) from error


def _is_context(annotation: Any) -> bool:
    return annotation is ToolContext or any(map(_is_context, _branches(annotation)))


def _branches(annotation: Any) -> tuple[Any, ...]:
    """The types an ``Annotated`` or a union is made of."""
    if typing.get_origin(annotation) is Annotated:
        return typing.get_args(annotation)[:1]
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else ()


def _annotated_description(key: str, annotation: Any) -> dict[str, str]:
    """A description given as ``Annotated[T, "text"]`` or ``Meta(description="text")``."""
    if typing.get_origin(annotation) is Annotated:
        for extra in typing.get_args(annotation)[1:]:
            text = extra.description if isinstance(extra, msgspec.Meta) else extra
            if isinstance(text, str):
                return {key: text}
    return {}


def _takes_none(annotation: Any) -> bool:
    found = msgspec.inspect.type_info(annotation)
    while isinstance(found, msgspec.inspect.Metadata):
        found = found.type
    if isinstance(found, msgspec.inspect.UnionType):
        return found.includes_none
    return isinstance(found, msgspec.inspect.AnyType | msgspec.inspect.NoneType)


# --- struct and schema -------------------------------------------------------------------------


def _struct(
    name: str, annotations: dict[str, Any], optional: dict[str, Any]
) -> type[msgspec.Struct]:
    fields: list[Any] = [
        (key, annotation, msgspec.UNSET) if key in optional else (key, annotation)
        for key, annotation in annotations.items()
    ]
    return msgspec.defstruct(f"{name}_arguments", fields, kw_only=True, frozen=True)


def _schema(
    arguments: type[msgspec.Struct], optional: dict[str, Any], described: dict[str, str]
) -> dict[str, Any]:
    (reference,), definitions = msgspec.json.schema_components(
        (arguments,), ref_template="#/$defs/{name}"
    )
    found = definitions.pop(reference["$ref"].removeprefix("#/$defs/"))
    properties: dict[str, Any] = found["properties"]
    for key, schema in properties.items():
        if key in described:
            schema["description"] = described[key]
        if key in optional:
            schema.update(_default(optional[key]))
    schema = {"type": "object", "properties": properties, "required": found["required"]}
    schema["additionalProperties"] = False
    return {**schema, "$defs": definitions} if definitions else schema


def _default(value: Any) -> dict[str, Any]:
    """The ``default`` keyword, for a value that JSON can express."""
    try:
        return {"default": msgspec.json.decode(msgspec.json.encode(value))}
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        return {}
