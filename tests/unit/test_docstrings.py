"""What users can import says what it takes, returns and raises.

The rule, for functions, classes and their methods without a leading underscore that a public module defines or exports.
A module is public if no part of its dotted name has a leading underscore; not `convexprune.adapters`, which no page
names. Behind an underscore one line is enough, or none where the name says it:

1.  It has a docstring. (An override needs none: the words stand at the method that it overrides.)
2.  `Args:` names exactly its parameters, `self` and `cls` aside.
3.  `Returns:` (or `Yields:`) is there unless the annotation of what it returns is None.
4.  `Raises:` names every error of `convexprune.errors` that a `raise` in its body makes.

The short form is exempt from 2 and 3: a docstring of one line, of a property or of a function with at most one
parameter, which the line names in backticks. It says what is returned.

A class has a docstring, which names every parameter of its constructor (for a dataclass: every field of its own), in
an `Args:` section or in backticks.
"""

import ast
import inspect
import re
import runpy
from collections.abc import Container, Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

import convexprune

PACKAGE = Path(convexprune.__file__).parent
ERRORS = {node.name for node in ast.parse((PACKAGE / "errors.py").read_text()).body if isinstance(node, ast.ClassDef)}
BY_SCHEMA = frozenset({"convexprune._api.calls", "convexprune.validation._compare"})
"""Modules whose functions take settings: the schema writes their Args when they are imported (`_schema.parameters`)."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_public(module: str) -> bool:
    parts = module.removesuffix(".__init__").split(".")
    return "adapters" not in parts and not any(part.startswith("_") for part in parts)


def modules() -> dict[str, Path]:
    """Every module by its dotted name; the links `adapters` and `validation` are followed."""
    found = {}
    folders = [PACKAGE]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if path.name in ("_cli", "__main__.py", "__pycache__"):
                continue
            if path.is_dir() and (path / "__init__.py").is_file():
                folders.append(path)
            elif path.suffix == ".py":
                found[".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def bases_and_methods() -> dict[str, tuple[set[str], set[str]]]:
    """For each class name of the package: the names of its bases, and of what it defines."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for path in modules().values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                bases, names = found.setdefault(node.name, (set(), set()))
                bases |= {name_of(base) for base in node.bases} - {node.name}
                names |= {part.name for part in node.body if isinstance(part, Function)}
    return found


def name_of(node: ast.expr) -> str:
    """The last part of a dotted or subscripted name."""
    if isinstance(node, ast.Subscript | ast.Call):
        return name_of(node.value if isinstance(node, ast.Subscript) else node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def overrides(kind: ast.ClassDef, method: str) -> bool:
    known, seen, left = bases_and_methods(), set[str](), {name_of(base) for base in kind.bases}
    while left:
        name = left.pop()
        seen.add(name)
        bases, names = known.get(name, (set(), set()))
        if method in names:
            return True
        left |= bases - seen
    return False


def section(doc: str, *titles: str) -> list[str] | None:
    """The names that a section lists, each before a colon; None if there is no such section."""
    match = re.search(rf"^(?:{'|'.join(titles)}):\n((?:[ ]+.*\n|\n)*)", doc + "\n", re.MULTILINE)
    if match is None:
        return None
    return [
        name.strip(" *`") for line in re.findall(r"^ {4}(\S[^:]*):", match[1], re.MULTILINE) for name in line.split(",")
    ]


def parameters(function: Function, is_method: bool) -> list[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *([given.vararg] if given.vararg else []), *given.kwonlyargs]
    every += [given.kwarg] if given.kwarg else []
    static = any(name_of(decorator) == "staticmethod" for decorator in function.decorator_list)
    return [each.arg for each in every][1 if is_method and not static else 0 :]


def raised(nodes: Sequence[ast.AST]) -> set[str]:
    """The errors of ours that a body itself raises and does not catch; not those of functions inside of it."""
    found = set[str]()
    for node in nodes:
        if isinstance(node, Function | ast.Lambda | ast.ClassDef):
            continue
        inside = raised(list(ast.iter_child_nodes(node)))
        if isinstance(node, ast.Try):
            caught = {
                name.id
                for one in node.handlers
                if one.type
                for name in ast.walk(one.type)
                if isinstance(name, ast.Name)
            }
            inside = (raised(node.body) - caught) | raised([*node.handlers, *node.orelse, *node.finalbody])
        if isinstance(node, ast.Raise) and node.exc is not None:
            inside.add(name_of(node.exc))
        found |= inside & ERRORS
    return found


def faults_of_function(function: Function, is_method: bool) -> Iterator[str]:
    doc = ast.get_docstring(function)
    if not doc:
        yield "has no docstring"
        return
    given, decorators = parameters(function, is_method), {name_of(each) for each in function.decorator_list}
    is_property = bool(decorators & {"property", "cached_property"})
    short = "\n" not in doc and len(given) <= 1 and all(f"`{name}`" in doc for name in given)
    if given and not short:
        named = section(doc, "Args")
        if named is None:
            yield f"has no Args: {', '.join(given)}"
        elif named != given:
            yield f"has Args {', '.join(named)} for {', '.join(given)}"
    returns = function.returns is not None and ast.unparse(function.returns) not in (
        "None",
        "Iterator[None]",
        "NoReturn",
    )
    if returns and not (short or is_property) and section(doc, "Returns", "Yields") is None:
        yield "has no Returns"
    text = doc.partition("Raises:\n")[2]
    if missing := sorted(
        error for error in raised(function.body) if error not in text and "ConvexpruneError" not in text
    ):
        yield f"has no Raises: {', '.join(missing)}"


def faults_of_class(kind: ast.ClassDef) -> Iterator[str]:
    doc = ast.get_docstring(kind)
    if not doc:
        yield "has no docstring"
        return
    made = any(name_of(each) == "dataclass" for each in kind.decorator_list) or "NamedTuple" in map(name_of, kind.bases)
    given = [
        part.target.id
        for part in kind.body
        if isinstance(part, ast.AnnAssign)
        and isinstance(part.target, ast.Name)
        and not ast.unparse(part.annotation).startswith("ClassVar")
    ]
    given = [name for name in given if made and not name.startswith("_")]
    for part in kind.body:
        if isinstance(part, Function) and part.name == "__init__":
            given = parameters(part, True)
    named = section(doc, "Args", "Attributes") or []
    if missing := [name for name in given if name not in named and f"`{name}`" not in doc]:
        yield f"does not name {', '.join(missing)}"


@cache
def exported() -> frozenset[tuple[str, str]]:
    """The module and name of each function and class that a public module exports."""
    places = set[tuple[str, str]]()
    for name in modules():
        if is_public(name):
            module = import_module(name.removesuffix(".__init__"))
            values = (getattr(module, each) for each in getattr(module, "__all__", ()))
            places |= {(value.__module__, value.__qualname__) for value in values if hasattr(value, "__qualname__")}
    return frozenset(places)


def asked(name: str) -> set[str] | None:
    """The names of a module that users can import; None: all of them."""
    if is_public(name):
        return None
    return {own for module, own in exported() if module == name}


def offences(path: Path, names: Container[Any] | None = None) -> Iterator[str]:
    for node in tree(path).body:
        if names is not None and getattr(node, "name", "") not in names:
            continue
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield from (f"{node.name} {fault}" for fault in faults_of_function(node, False))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (f"{node.name} {fault}" for fault in faults_of_class(node))
            for part in node.body:
                if not isinstance(part, Function) or part.name.startswith("_") or overrides(node, part.name):
                    continue
                if not any(name_of(each) in ("overload", "setter") for each in part.decorator_list):
                    yield from (f"{node.name}.{part.name} {fault}" for fault in faults_of_function(part, True))


@pytest.mark.parametrize("name", modules())
def test_public_names_say_what_they_take_return_and_raise(name: str) -> None:
    found = list(offences(modules()[name], asked(name)))
    if name in BY_SCHEMA:
        assert found, f"{name} says it all in the source: take it off the list BY_SCHEMA."
    else:
        assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["compare", "compare_samples", "evaluate", "inspect", "permute", "prune", "verify"])
def test_functions_that_take_settings_name_them_all_once_they_are_imported(name: str) -> None:
    function = getattr(convexprune, name)
    text = inspect.getdoc(function) or ""
    missing = [each for each in inspect.signature(function).parameters if f"\n    {each}: " not in text]
    assert not missing and all(f"\n{part}:\n" in text for part in ("Args", "Returns", "Raises"))


def test_what_docstrings_and_pages_refer_to_is_there() -> None:
    pages = (path for folder in (PACKAGE.parent, PACKAGE.parent / "docs") for path in folder.glob("*.md"))
    files = [*modules().values(), *(page for page in pages if page.name != "CHANGELOG.md")]
    named = {name for path in files for name in re.findall(r"`(convexprune(?:\.\w+)+)`", path.read_text())}
    assert len(named) > 10
    for name in sorted(named):
        resolve_name(name)


def test_no_page_names_the_adapters() -> None:
    pages = [*PACKAGE.parent.glob("*.md"), *(PACKAGE.parent / "docs").glob("*.md")]
    named = {page.name for page in pages if "convexprune.adapters" in page.read_text()}
    assert len(pages) > 20 and named <= {"CONTRIBUTING.md"}


def test_what_users_import_is_asked_wherever_it_is_defined() -> None:
    assert "certify" in (asked("convexprune.core._certificate") or ())
    assert asked("convexprune._layerwise.capture") == set()
    assert asked("convexprune.recipe") is None


def test_the_list_of_exceptions_names_modules_that_are_there() -> None:
    assert set(modules()) >= BY_SCHEMA


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("def f(): pass", "f has no docstring"),
        ('def f(x) -> None:\n    """A."""', "f has no Args: x"),
        ('def f(x) -> int:\n    """A `x`."""', None),
        ('def f(x) -> None:\n    """A.\n\n    Args:\n        y: b.\n    """', "f has Args y for x"),
        ('def f(x) -> int:\n    """A.\n\n    Args:\n        x: b.\n    """', "f has no Returns"),
        ('def f(x) -> int:\n    """A.\n\n    Args:\n        x: b.\n\n    Returns:\n        C.\n    """', None),
        ('def f() -> None:\n    """A."""\n    raise ModelError("")', "f has no Raises: ModelError"),
        (
            'def f() -> None:\n    """A."""\n    try:\n        raise ModelError("")\n    except ModelError: pass',
            None,
        ),
        ('class C:\n    """A."""\n    def g(self, x): pass', "C.g has no docstring"),
        ('class C:\n    """A."""\n    def __init__(self, x): pass', "C does not name x"),
        ('@dataclass\nclass C:\n    """A `x`."""\n    x: int', None),
    ],
)
def test_a_fault_is_found(code: str, fault: str | None, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(code)
    assert list(offences(path)) == ([] if fault is None else [fault])


GRAMMAR = runpy.run_path(str(PACKAGE.parent / "benchmarks" / "grammar.py"))


def test_docstrings_open_with_a_verb_or_a_noun_and_name_things():
    """No opening is vague, and at most 4 % of the words are pronouns (httpx 1.5 %, lineax 4.8 %)."""
    texts = [(path, name, text) for path in GRAMMAR["product_files"]() for name, text in GRAMMAR["docstrings"](path)]
    words = [[word.lower() for word in GRAMMAR["words"](text)] for _, _, text in texts]
    vague = [f"{path}: {name}: {text}" for path, name, text in texts if text.split()[0] in GRAMMAR["VAGUE"]]
    assert not vague, "\n".join(vague)
    pronouns = sum(word in GRAMMAR["PRONOUNS"] for text in words for word in text)
    assert len(texts) > 1000 and pronouns <= 0.04 * sum(map(len, words))
