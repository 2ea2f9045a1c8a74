"""The tool decorator: schemas, arguments, results, and what it refuses."""

from __future__ import annotations

import asyncio
import functools
import socket
from typing import Annotated, Any, Literal

import msgspec
import pytest

from understudy.actors.models.protocol import ToolSpec
from understudy.actors.tools.context import DetachedContext, ToolContext
from understudy.actors.tools.tool import Tool, ToolResult, tool, toolbox
from understudy.errors import InvalidInput, ToolError


class Place(msgspec.Struct):
    city: str
    country: str = "NO"


@tool
def weather(place: Place, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
    """Look up the weather.

    It may rain.

    Args:
        place: where, as
            precisely as you can.
        unit: of the temperature.
        days (int): how many days ahead.

    Returns:
        a sentence.
    """
    return f"{place.city} {days} {unit}"


@tool(name="look-up", description="Finds.", idempotent=True, permission="net", timeout_s=3)
async def look_up(query: Annotated[str, "what to find"], ctx: ToolContext) -> str:
    await asyncio.sleep(0)
    return f"{query} for {ctx.session_id}"


class Counter:
    def __init__(self, start: int) -> None:
        self.value = start

    def _about(self, given: dict[str, Any]) -> list[str]:
        return [f"{self.value}+{given['by']}"]

    @tool(patterns=_about, always=_about)
    def add(self, by: int) -> int:
        """Add."""
        self.value += by
        return self.value

    def plain(self, by: int) -> int:
        return self.value - by


# --- schema ------------------------------------------------------------------------------------


def test_the_signature_is_the_schema_and_the_docstring_describes_it() -> None:
    schema = weather.parameters
    assert schema["type"] == "object"
    assert schema["required"] == ["place"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["days"] == {
        "type": "integer",
        "default": 1,
        "description": "how many days ahead.",
    }
    assert schema["properties"]["place"] == {
        "$ref": "#/$defs/Place",
        "description": "where, as precisely as you can.",
    }
    assert schema["properties"]["unit"] == {
        "enum": ["C", "F"],
        "default": "C",
        "description": "of the temperature.",
    }
    assert set(schema["$defs"]) == {"Place"}
    assert (
        weather.description == "Look up the weather.\n\nIt may rain.\n\nReturns:\n    a sentence."
    )


def test_the_spec_is_what_the_model_is_told() -> None:
    assert look_up.spec() == ToolSpec("look-up", "Finds.", look_up.parameters)
    assert (look_up.idempotent, look_up.permission, look_up.timeout_s) == (True, "net", 3)
    assert look_up.is_async and not weather.is_async


def test_the_context_is_injected_and_not_in_the_schema() -> None:
    assert list(look_up.parameters["properties"]) == ["query"]
    assert look_up.parameters["properties"]["query"]["description"] == "what to find"
    context = DetachedContext(session_id="ses_1")
    assert asyncio.run(look_up.invoke({"query": "x"}, context)) == "x for ses_1"
    assert asyncio.run(look_up.invoke({"query": "x"})) == "x for "


def test_an_optional_context_stays_away_when_there_is_none() -> None:
    @tool
    def calm(ctx: ToolContext | None = None) -> bool:
        return ctx is None

    assert calm.parameters["properties"] == {}
    assert calm.invoke({}) is True
    assert calm.invoke({}, DetachedContext()) is False


def test_a_meta_constrains_and_describes() -> None:
    @tool
    def pick(count: Annotated[int, msgspec.Meta(ge=1, description="how many")] = 2) -> int:
        return count

    assert pick.parameters["properties"]["count"] == {
        "type": "integer",
        "minimum": 1,
        "default": 2,
        "description": "how many",
    }
    with pytest.raises(ToolError, match=r">= 1.*`count`"):
        pick.parse('{"count": 0}')


def test_a_parameter_without_annotation_takes_anything() -> None:
    loose = tool(lambda_like)
    assert loose.parameters["properties"] == {"thing": {}}
    assert loose.parse('{"thing": [1, {"a": null}]}') == {"thing": [1, {"a": None}]}


def lambda_like(thing):
    return thing


def test_a_default_that_json_cannot_express_is_left_out() -> None:
    missing: Any = object()

    @tool
    def odd(a: int = missing) -> bool:
        return a is missing

    assert odd.parameters["properties"]["a"] == {"type": "integer"}
    assert odd.invoke(odd.parse("")) is True


def test_a_tool_stays_callable_as_its_function() -> None:
    assert weather(Place("Oslo"), days=2) == "Oslo 2 C"
    assert weather.__doc__ is not None


def test_methods_are_tools_of_their_instance() -> None:
    one, two = Counter(1), Counter(10)
    assert one.add.invoke(one.add.parse('{"by": 2}')) == 3
    assert two.add(5) == 15
    assert one.add.patterns({"by": 4}) == ("3+4",) == one.add.always({"by": 4})
    assert tool(one.plain).invoke({"by": 1}) == 2
    assert list(one.add.parameters["properties"]) == ["by"]
    with pytest.raises(InvalidInput, match="method"):
        toolbox([Counter.add])


def test_partials_and_callable_objects_are_tools() -> None:
    class Shout:
        async def __call__(self, text: str) -> str:
            return text.upper()

    assert tool(name="shout")(Shout()).is_async
    fixed = tool(name="fixed")(functools.partial(lambda_like, thing=1))
    assert fixed.invoke(fixed.parse("{}")) == 1


# --- refusals ----------------------------------------------------------------------------------


def test_what_has_no_schema_is_refused_naming_function_and_parameter() -> None:
    def send(address: str, through: socket.socket) -> None: ...
    def many(*names: str) -> None: ...
    def keyed(**names: str) -> None: ...
    def placed(name: str, /) -> None: ...
    def unknown(name: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
    def either(value: list[int] | tuple[str, ...]) -> None: ...
    def twice(one: ToolContext, two: ToolContext) -> None: ...

    for function, parameter in (
        (send, "through"),
        (many, "names"),
        (keyed, "names"),
        (placed, "name"),
        (unknown, "name"),
        (either, "value"),
        (twice, "ToolContext"),
    ):
        with pytest.raises(InvalidInput, match=rf"{function.__name__}.*{parameter}"):
            tool(function)


def test_unusable_functions_and_options_are_refused() -> None:
    def stream():
        yield 1

    with pytest.raises(InvalidInput, match="generator"):
        tool(stream)
    with pytest.raises(InvalidInput, match="not int"):
        tool(3)  # type: ignore[call-overload]
    with pytest.raises(InvalidInput, match="<lambda>"):
        tool(lambda: None)
    for options in (
        *({"timeout_s": each} for each in (0, True, "3", float("nan"))),
        *({"max_output": each} for each in (-1, True, 2.5, "3")),
        *({"name": each} for each in ("a b", "x" * 65, 3)),
    ):
        with pytest.raises(InvalidInput):
            tool(**options)(lambda_like)


def test_a_toolbox_wraps_functions_and_refuses_a_name_used_twice() -> None:
    box = toolbox([weather, lambda_like])
    assert list(box) == ["weather", "lambda_like"]
    assert box["weather"] is weather and isinstance(box["lambda_like"], Tool)
    with pytest.raises(InvalidInput, match="weather"):
        toolbox([weather, tool(name="weather")(lambda_like)])


# --- arguments ---------------------------------------------------------------------------------


def test_arguments_are_converted_and_defaults_left_to_the_function() -> None:
    parsed = weather.parse('{"place": {"city": "Oslo"}, "days": "3"}')
    assert parsed == {"place": Place("Oslo"), "days": 3}
    assert weather.invoke(parsed) == "Oslo 3 C"


@pytest.mark.parametrize("text", ["", "  \n", "null", "{}"])
def test_no_arguments_at_all_is_an_empty_object(text: str) -> None:
    assert tool(name="none")(lambda: None).parse(text) == {}
    assert weather.raw_input(text) == {}


def test_null_for_what_may_be_left_out_is_left_out() -> None:
    @tool
    def f(a: int = 1, b: int | None = 2) -> tuple[int, int | None]:
        return a, b

    assert f.parse('{"a": null, "b": null}') == {"b": None}


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("{}", ["required field `place`", "place (any, required)", "days (integer)"]),
        ('{"place": {"city": 3}}', ["Expected `str`, got `int`", "`place.city`"]),
        ('{"place": {"city": "x"}, "days": "soon"}', ["Expected `int`", "`days`"]),
        ('{"place": {"city": "x"}, "unit": "K"}', ["Invalid enum value 'K'", "`unit`"]),
        ('{"place": 1, "plaice": 2, "size": 3}', ["unknown arguments: `plaice`, `size`"]),
        ('{"place": ', ["not a JSON object"]),
        ("[1]", ["not a JSON object", "array"]),
        ("[" * 100_000, ["not a JSON object"]),
        ('{"place": "\ud800"}', ["not a JSON object"]),
    ],
)
def test_wrong_arguments_say_what_to_correct(text: str, hints: list[str]) -> None:
    with pytest.raises(ToolError) as caught:
        weather.parse(text)
    for hint in ("weather", *hints):
        assert hint in str(caught.value)


def test_raw_input_keeps_what_the_model_wrote() -> None:
    assert weather.raw_input('{"days": "3"}') == {"days": "3"}
    assert weather.raw_input('{"days": ') == {"_raw": '{"days": '}
    assert weather.raw_input("[1]") == {"_raw": "[1]"}
    assert weather.raw_input("\ud800") == {"_raw": "?"}


# --- results -----------------------------------------------------------------------------------


def test_values_become_results() -> None:
    assert weather.render("text") == ToolResult("text")
    assert weather.render(None) == ToolResult("")
    assert weather.render({"a": [1, Place("Oslo")]}) == ToolResult(
        '{"a":[1,{"city":"Oslo","country":"NO"}]}'
    )
    result = ToolResult("out", "title", {"n": (1, 2)})
    assert weather.render(result) == ToolResult("out", "title", {"n": [1, 2]})


def test_a_value_that_json_cannot_express_names_its_type() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ToolError, match=r"weather returned a Counter"):
        weather.render(Counter(1))
    with pytest.raises(ToolError, match="list"):
        weather.render(endless)
    with pytest.raises(ToolError, match="dict"):
        weather.render(ToolResult("x", metadata={"c": Counter(1)}))


def test_a_long_output_is_cut_in_the_middle_and_says_so() -> None:
    @tool(max_output=100)
    def long() -> None: ...

    result = long.render("a" * 150 + "z" * 150)
    assert result.output.startswith("a" * 50 + "\n")
    assert result.output.endswith("\n" + "z" * 50)
    assert "200 characters left out" in result.output
    assert result.metadata == {"truncated": True}
    assert long.render("x" * 100) == ToolResult("x" * 100)


def test_text_that_cannot_be_stored_is_repaired() -> None:
    assert weather.render("a\ud800b").output == "a?b"
    msgspec.json.encode(weather.render(ToolResult("\udcff", "\udcff")))


def test_patterns_default_to_everything() -> None:
    assert weather.patterns({}) == ("*",) == weather.always({})
