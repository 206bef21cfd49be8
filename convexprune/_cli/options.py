"""The options of a command, made from settings: names, types, defaults and help."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from convexprune._cli.application import app, dashed
from convexprune._schema.parameters import LISTED, Parameters
from convexprune.errors import RecipeError

PRINTED = "what is printed"
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.", rich_help_panel=PRINTED)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing on stderr but errors.", rich_help_panel=PRINTED)
]
AllowChanged = Annotated[
    bool, typer.Option("--allow-changed", help="Take a result whose files are not those that its run wrote.")
]
READ_AS = {bool: bool, int: int, float: float, Path: Path, str: str, Literal: str, dict: str, ByteSize: str}


def command(
    parameters: Parameters[Any], argument: str | None = None, *, name: str | None = None, **defaults: Any
) -> Any:
    """Add a function as a command, with an option for every setting of its parameter `settings`.

    The function gets the settings that the user gave, and the `defaults` of the command line. The setting `argument`
    comes first on the line; an option of its name is taken too, as in other tools.
    """
    aliases = {option[2:]: dashed(field) for field in parameters.fields for option in _long(parameters, field)}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        others = [p for p in inspect.signature(function).parameters.values() if p.name != "settings"]
        options = [_option(parameters, field, field == argument, defaults.get(field)) for field in parameters.fields]
        named = f"{argument}_"
        hidden = [] if argument is None else [_parameter(named, str | None, typer.Option(f"--{argument}", hidden=True))]

        def run(**given: Any) -> None:
            rest = {other.name: given.pop(other.name) for other in others}
            if argument is not None and (value := given.pop(named)) is not None:
                if given[argument] is not None:
                    raise RecipeError(f"The {argument} came twice: {given[argument]!r} and --{argument} {value!r}.")
                given[argument] = value
            chosen = {field: value for field, value in given.items() if value is not None and value != []}
            function(settings={**defaults, **chosen}, **rest)

        every = [*filter(None, options), *(other.replace(kind=other.KEYWORD_ONLY) for other in others), *hidden]
        run.__dict__["__signature__"] = inspect.Signature(sorted(every, key=lambda each: each.name != argument))
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        # An alias may be written with underscores or dashes.
        app.command(
            name, context_settings={"token_normalize_func": lambda word: aliases.get(dashed(word), dashed(word))}
        )(run)
        return function

    return decorate


def _option(parameters: Parameters[Any], name: str, is_argument: bool, default: Any) -> inspect.Parameter | None:
    info, hint, others = parameters.fields[name], parameters.hint(name), _long(parameters, name)
    kind = str if hint.named else _kind(info)
    if kind is None:  # what no text can say
        return None
    required = info.default is PydanticUndefined
    if is_argument:
        place = typer.Argument(help=info.description, show_default=False)
        return _parameter(name, kind if required else kind | None, place, required)
    names = [f"--{dashed(name)}", *(option for option in hint.options if option not in others)]
    if kind is bool:
        names[0] += f"/--no-{names[0][2:]}"
    help = f"{info.description}{_default(info.default if default is None else default)}"
    place = typer.Option(
        *names,
        help=help + (f" Also {', '.join(others)}." if others else ""),
        show_default=False,
        metavar=f"[{'|'.join(hint.choices)}]" if hint.choices else None,
        autocompletion=(lambda: list(hint.choices)) if hint.choices else None,
        rich_help_panel=None if hint.first else parameters.group_of(name),
    )
    return _parameter(name, kind if required else kind | None, place, required)


def _long(parameters: Parameters[Any], name: str) -> list[str]:
    return [option for option in parameters.hint(name).options if option.startswith("--")]


def _parameter(name: str, kind: Any, place: Any, required: bool = False) -> inspect.Parameter:
    default = inspect.Parameter.empty if required else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, place])


def _kind(info: FieldInfo) -> Any:
    """Return the type that the command line reads. The setting's check converts further."""
    kind = info.annotation
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    origin = get_origin(kind) or kind
    if origin is tuple:
        return str if LISTED in info.metadata else list[str]
    return READ_AS.get(origin)


def _default(value: Any) -> str:
    if value is None or value is False or value is PydanticUndefined or value in ((), {}):
        return ""
    return f" Default: {', '.join(map(str, value)) if isinstance(value, tuple) else value}."
