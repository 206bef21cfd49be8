"""YAML of plain values: no aliases, no objects, and 2:4 is a text."""

import re
from typing import Any

import yaml

INTEGER, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _PlainLoader(yaml.SafeLoader):
    """A YAML loader without aliases, which can turn a few lines into gigabytes, and without numbers in base 60.

    In YAML 1.1, 2:4 is the number 124.
    """

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


def load(text: str) -> Any:
    return yaml.load(text, _PlainLoader)
