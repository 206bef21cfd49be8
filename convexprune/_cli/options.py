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

from convexprune._cli.application import dashed
from convexprune._schema.door import LISTED, Door
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
Command = Callable[..., None]
READ_AS = {bool: bool, int: int, float: float, Path: Path, str: str, Literal: str, dict: str, ByteSize: str}


def with_settings(
    door: Door[Any], argument: str | None = None, **defaults: Any
) -> Callable[[Any], Callable[..., None]]:
    """Replace a command's parameter `settings` by an option for every setting of a door.

    The command gets the settings that the user gave, and the `defaults` of the command line. The setting `argument` has
    no option: its value comes first on the line.
    """

    def decorate(command: Command) -> Command:
        parameters = inspect.signature(command).parameters.values()
        own = [each.replace(kind=each.KEYWORD_ONLY) for each in parameters if each.name != "settings"]
        options = [_option(door, name, name == argument, defaults.get(name)) for name in door.fields]
        every = [*filter(None, options), *own, *([] if argument is None else [_named_argument(argument)])]

        def run(**given: Any) -> None:
            mine = {each.name: given.pop(each.name) for each in own}
            if argument is not None and (named := given.pop(f"{argument}_")) is not None:
                if given[argument] is not None:
                    raise RecipeError(f"The {argument} came twice: {given[argument]!r} and --{argument} {named!r}.")
                given[argument] = named
            chosen = {name: value for name, value in given.items() if value is not None and value != []}
            command(settings={**defaults, **chosen}, **mine)

        run.__dict__["__signature__"] = inspect.Signature(sorted(every, key=lambda each: each.name != argument))
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def also_called(door: Door[Any]) -> dict[str, Any]:
    """Return the entries that a command needs to accept all names of a door's options, with underscores or dashes."""
    names = {option[2:]: dashed(name) for name in door.fields for option in _long(door, name)}
    return {"token_normalize_func": lambda word: names.get(dashed(word), dashed(word))}


def _option(door: Door[Any], name: str, is_argument: bool, default: Any) -> inspect.Parameter | None:
    info = door.fields[name]
    kind = str if door.is_named(name) else _kind(info)
    if kind is None:  # what no text can say
        return None
    required = info.default is PydanticUndefined
    others, choices = _long(door, name), door.choices_of(name)
    names = [f"--{dashed(name)}", *(each for each in door.options_of(name) if each not in others)]
    if kind is bool:
        names[0] += f"/--no-{names[0][2:]}"
    help = f"{info.description}{_default(info.default if default is None else default)}"
    help += f" Also {', '.join(others)}." if others else ""
    place = (
        typer.Argument(help=info.description, show_default=False)
        if is_argument
        else typer.Option(
            *names,
            help=help,
            show_default=False,
            metavar=f"[{'|'.join(choices)}]" if choices else None,
            autocompletion=(lambda: list(choices)) if choices else None,
            rich_help_panel=None if door.comes_first(name) else door.group_of(name),
        )
    )
    return _parameter(name, kind if required else kind | None, place, required)


def _long(door: Door[Any], name: str) -> list[str]:
    return [option for option in door.options_of(name) if option.startswith("--")]


def _named_argument(name: str) -> inspect.Parameter:
    """Return an option with the name of the leading argument, as in other tools."""
    return _parameter(f"{name}_", str | None, typer.Option(f"--{name}", hidden=True))


def _parameter(name: str, kind: Any, place: Any, required: bool = False) -> inspect.Parameter:
    """Return the parameter of an option for typer; None means that the user gave no value."""
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
