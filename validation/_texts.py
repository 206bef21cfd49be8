"""Texts to evaluate on, files and what every installation has; and tasks of lm-eval, with standard errors."""

import ast
import logging
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from convexprune.adapters import CORPORA, TEXT_FILES, HuggingFaceModel, is_file, read_text, split_field
from convexprune.errors import CalibrationError, DependencyError, ModelError, RecipeError, install_hint, unknown

from ._results import short

STATEMENTS = ast.stmt | ast.excepthandler | ast.match_case  # what a definition stands in
LICENCE_NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")


def is_text_file(source: str) -> bool:
    return source not in (*TEXTS, *CORPORA) and is_file(str(split_field(source)[0]))


def text_of(source: str) -> str:
    if source in TEXTS:
        return TEXTS[source]()
    if is_text_file(source):
        return read_text(source)
    raise CalibrationError(f"{unknown('text', source, TEXTS)} Or give a path that ends in {' or '.join(TEXT_FILES)}.")


@cache
def python_docs() -> str:
    """Return the docstrings of Python's standard library by module; they change with the version of Python."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    return "\n\n".join(doc for path in files for doc in _docstrings(path))


@cache
def licences() -> str:
    """Return the licences of the installed packages, without repeated paragraphs; they change with the packages."""
    paragraphs: dict[str, None] = {}
    for distribution in sorted(distributions(), key=lambda d: d.metadata["Name"].lower()):
        for file in sorted(distribution.files or [], key=str):
            if file.name.upper().startswith(LICENCE_NAMES) and file.suffix not in (".py", ".pyc"):
                path = Path(str(file.locate()))
                text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
                paragraphs |= {" ".join(part.split()): None for part in text.split("\n\n")}
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


TEXTS: dict[str, Callable[[], str]] = {"python-docs": python_docs, "licences": licences}


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # the library carries a few files that are wrong on purpose
        return
    waiting = deque[ast.AST]([tree])
    while waiting:  # breadth first, as `ast.walk`, but past all expressions
        node = waiting.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc is not None and len(doc) >= 200:
                yield doc
        if hasattr(node, "body") or isinstance(node, ast.Match):
            waiting.extend(n for n in ast.iter_child_nodes(node) if isinstance(n, STATEMENTS))


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task, with its standard error if it has one, and the values of the dense model, if any."""

    task: str
    metric: str
    value: float
    error: float | None
    items: int | None
    dense: float | None = None
    dense_error: float | None = None
    part_of: str | None = None  # the group whose value of this metric has this one in it

    def beside(self, dense: "TaskScore") -> "TaskScore":
        return replace(self, dense=dense.value, dense_error=dense.error)

    def shown(self, both: bool) -> list[str]:
        pairs = [(self.value, self.error), *([(self.dense, self.dense_error)] if both else [])]
        return [short(value, ".4f") + ("" if error is None else f" ± {error:.4f}") for value, error in pairs]


def require_tasks(names: Sequence[str], folder: Path | None) -> None:
    if find_spec("lm_eval") is None:
        raise DependencyError(f"Tasks need lm-eval: {install_hint('eval')}")
    if folder is not None and not folder.expanduser().is_dir():
        raise RecipeError(f"tasks_dir={str(folder)!r} is no folder. Give one with task files (.yaml) of lm-eval.")
    manager = _manager(names, folder)
    known = manager.all_tasks
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3)
            guess = f" Did you mean {', '.join(near)}?" if near else ""
            raise RecipeError(f"Unknown task {name!r}.{guess} `lm-eval ls tasks` lists all of them.")
    try:
        (manager.load if hasattr(manager, "load") else manager.load_task_or_group)(list(names))  # with their data
    except Exception as cause:  # a task raises what it likes
        raise RecipeError(f"Tasks {', '.join(names)} cannot be loaded: {cause}") from cause


def evaluate_tasks(
    model: HuggingFaceModel, names: Sequence[str], folder: Path | None, **settings: Any
) -> tuple[TaskScore, ...]:
    """Score tasks, with `settings` of lm-eval beside: `limit`, `num_fewshot`, `batch_size`."""
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so it reads no task. Give tokenizer= (in Python).")
    harness, models = import_module("lm_eval.evaluator"), import_module("lm_eval.models.huggingface")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what it says of the model is not so: it is loaded already
    wrapped = models.HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=settings.pop("batch_size"))
    with patch.multiple(harness, create=True, get_git_commit_hash=str, add_env_info=bool):  # which run git and pip
        found = harness.simple_evaluate(
            model=wrapped, tasks=list(names), task_manager=_manager(names, folder), log_samples=False, **settings
        )
    assert found is not None  # but on other ranks
    counts: dict[str, Any] = found.get("n-samples", {})
    scores = [s for task, metrics in found["results"].items() for s in _scores(task, metrics, counts.get(task))]
    groups: dict[str, list[str]] = found.get("group_subtasks", {})
    whole = {(part, s.metric): s.task for s in scores for part in groups.get(s.task, [])}
    return tuple(replace(score, part_of=whole.get((score.task, score.metric))) for score in scores)


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """Return the task manager: of the folder alone if only folder tasks are requested, because that is quicker."""
    make = import_module("lm_eval.tasks").TaskManager
    if folder is None:
        return make()
    place = str(folder.expanduser())
    own = make(include_path=place, include_defaults=False)
    return own if set(names) <= set(own.all_tasks) else make(include_path=place)


def _scores(task: str, metrics: dict[str, Any], count: dict[str, int] | None) -> list[TaskScore]:
    """Return the numbers of a task, stored as "acc,none" beside "acc_stderr,none"."""
    scores = []
    for key, value in metrics.items():
        metric, _, how = key.partition(",")
        if not how or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{how}")
        name = metric if how == "none" else f"{metric} ({how})"
        known = float(error) if isinstance(error, int | float) else None
        scores.append(TaskScore(task, name, float(value), known, None if count is None else count.get("effective")))
    return scores
