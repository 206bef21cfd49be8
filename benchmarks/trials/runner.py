"""Runs a row in a child of this process, which has imported everything, and names what happened."""

import io
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rows import Answer, Row

from convexprune.errors import ConvexpruneError

REFUSED, FAILED, WRONG = 2, 1, 3  # exit statuses: the first two are the command line's own
LONG = 3000
MARK = "wrong: "
FRAME = re.compile("[│╭╮╰╯─━]")


def answer(row: Row, patience: float = 1.0) -> Answer:
    """What the row answers; the files that it makes in the working directory are counted and removed."""
    before = set(Path().rglob("*"))
    began = time.monotonic()
    status, said = in_child(row.run, row.within * patience)
    seconds = time.monotonic() - began
    left = set(Path().rglob("*")) - before
    for path in left:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(True)
    if status == WRONG:
        said = said.rpartition(MARK)[2]
    return Answer(_kind(row, status, said, bool(left)), seconds, said.replace(f"{Path.cwd()}/", ""))


def _kind(row: Row, status: int | None, said: str, left: bool) -> str:
    if status is None:
        return "slow"
    if status == WRONG:
        return "wrong"
    if "Traceback (most recent call last)" in said or status < 0:
        return "raw"
    if status == 0:
        return "right" if "right" in row.accepts else "done"
    if status == FAILED:
        return "failed"
    return "late" if left else "long" if len(said) > LONG else "refused"


def in_child(run: Callable[[], object], within: float) -> tuple[int | None, str]:
    """(exit status or None, what was printed) of `run` in a process group of its own; after `within` s it is killed."""
    with tempfile.TemporaryFile() as out:
        child = os.fork()
        if child == 0:
            os.setsid()
            _redirect(out.fileno())
            _leave(run)
        status = _wait(child, time.monotonic() + within)
        out.seek(0)
        text = FRAME.sub(" ", out.read().decode(errors="replace"))
    return status, " ".join(text.split())


def _redirect(out: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, out), (2, out)):
        os.dup2(source, target)
    sys.stdout = sys.stderr = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), errors="replace", write_through=True)


def hide(*names: str) -> None:
    """Have these packages be missing from here on."""
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(names))


def _leave(run: Callable[[], object]) -> NoReturn:
    """Run, say how it ended, and end this process without what its parent would do at the end."""
    status = FAILED
    os.environ["HOME"] = os.getcwd()
    try:
        warnings.simplefilter("default")
        status = _status(run)
        sys.stdout.flush()
    finally:
        os._exit(status)


def _status(run: Callable[[], object]) -> int:
    try:
        run()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else FAILED
    except ConvexpruneError as error:
        print(f"{type(error).__name__}: {error}")
        return REFUSED
    except BaseException as error:
        if isinstance(error, AssertionError) and _is_ours(error):
            print(f"{MARK}{error}")
            return WRONG
        traceback.print_exc()
        return FAILED
    return 0


def _is_ours(error: AssertionError) -> bool:
    """Whether a row asserted it, and not a library."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return innermost == "<string>" or Path(innermost).parent == Path(__file__).parent


def _wait(child: int, until: float) -> int | None:
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
