"""Groups of settings: declaration and checks."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from convexprune.errors import ConvexpruneError, RecipeError, shown, unknown

FAULTS = 5  # that one error tells

Made = TypeVar("Made", bound="Settings")


class Settings(BaseModel):
    """A group of settings. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    group: ClassVar[str] = ""


class Hint(NamedTuple):
    """Facts of a setting that pydantic does not know."""

    options: tuple[str, ...]  # aliases on the command line, and, without dashes, in Python
    choices: tuple[str, ...]  # all accepted values, if the list is closed
    first: bool  # heads the help of a command
    named: bool  # the command line takes a name while Python also takes an object


def setting(
    default: Any, help: str, *options: str, choices: Any = (), first: bool = False, named: bool = False, **limits: Any
) -> Any:
    hint: Any = {"hint": Hint(options, choices, first, named)}
    return Field(default, description=help, json_schema_extra=hint, **limits)


def checked(kind: type[Made], settings: Mapping[str, Any]) -> Made:
    """Make a group of settings from keywords, with a single readable error for all faults."""
    try:
        return kind(**settings)
    except ValidationError as error:
        faults = [fault for fault in error.errors() if not _contains_another(fault, error.errors())]
        causes = [fault.get("ctx", {}).get("error") for fault in faults]
        if ours := [cause for cause in causes if isinstance(cause, ConvexpruneError)]:
            raise ours[0] from None  # it is ours and says it all
        raise RecipeError(" ".join(_told(fault, kind) for fault in faults[:FAULTS])) from error


def _contains_another(fault: Mapping[str, Any], faults: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if another fault is about a part of the same value: a tuple with a bad entry counts as empty."""
    place = fault["loc"]
    return any(len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in faults)


def from_yaml(value: Any) -> Any:
    """Parse YAML text from the command line; any other `value` is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return load_yaml(value)
    except yaml.YAMLError:
        return value


def _told(fault: Mapping[str, Any], kind: type[Settings]) -> str:
    name = ".".join(str(part) for part in fault["loc"])[:100]
    if fault["type"] == "extra_forbidden":
        *inside, last = fault["loc"]
        if not inside:
            return unknown("setting", last, kind.model_fields)
        (each, *_) = get_args(kind.model_fields[str(inside[0])].annotation)  # of a tuple of groups
        return unknown(f"setting of {'.'.join(map(str, inside))}", last, each.model_fields)
    if fault["type"].startswith("byte_size"):
        return f"{name}={shown(fault['input'])} is no amount of bytes. Write it as 24GiB, 80GB or 512MiB."
    if fault["type"] == "model_type":
        return f"{name}={shown(fault['input'])} names no settings. Write {{targets: [q_proj], sparsity: 0.3}}, say."
    return f"{name}={shown(fault['input'])}: {fault['msg']}."


INTEGER, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _PlainLoader(yaml.SafeLoader):
    """A YAML loader without aliases, of which a few lines make gigabytes, and without base 60, in which 2:4 is 124."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name)")
        return super().compose_node(parent, index)


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (INTEGER, FLOAT)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(INTEGER, re.compile(r"[-+]?\d+$"), list("-+0123456789"))
_PlainLoader.add_implicit_resolver(
    FLOAT,
    re.compile(r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def load_yaml(text: str) -> Any:
    return yaml.load(text, _PlainLoader)
