"""The one place where an output is made: in a marked, hidden folder beside it, put in its place by a rename."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from convexprune._storage.failures import writing
from convexprune._storage.files import flush, locked, make_folder, overwrite, publish, read_notes, write_notes
from convexprune.errors import OutputError

MARKER, LOCK = "marker.json", "lock"
LONGEST = 1 << 12  # bytes of a marker


def output_folder(given: str | Path, source: Any = None, *, is_staged: bool = True) -> Path:
    """Return the folder for a result, made beside it if `is_staged`, links followed, after all checks without work."""
    try:
        folder = Path(given).expanduser()
        model = Path(source).expanduser() if isinstance(source, str | Path) else None
    except RuntimeError as cause:
        raise OutputError(f"{given}: {cause} Write the folder without '~'.") from cause
    except TypeError as cause:
        raise OutputError(f"{given!r} is no path. Give the name of an output folder.") from cause
    with writing(folder):
        if folder.is_symlink() or folder.name in ("", ".."):
            folder = followed(folder)
        if model is not None and model.is_dir() and folder.resolve().is_relative_to(model.resolve()):
            raise OutputError(f"{folder} lies inside of the model's own folder, {model}. Give another output folder.")
        if is_staged:
            _require_movable(folder)
        places = (folder.absolute(), *folder.absolute().parents)
        there = next(path for path in places[is_staged:] if path.exists())
        if not there.is_dir():
            raise OutputError(f"{folder} cannot be made: {there} is a file. Give another output folder.")
        try:
            os.rmdir(mkdtemp(dir=there, prefix=".", suffix=".part"))
        except OSError as cause:
            inside = f", {folder / 'NAME'} say" if is_staged and folder.is_dir() else ""
            raise OutputError(
                f"Nothing can be written to {there} ({cause.strerror or cause}). Give another output folder{inside}."
            ) from cause
    return folder


def followed(link: Path) -> Path:
    """Return the target of a link; refuse a target that is not there."""
    if not link.exists():
        raise OutputError(
            f"{link} is a link to {os.readlink(link)}, which is not there. Make that, or remove the link."
        )
    return link.resolve()


def _require_movable(folder: Path) -> None:
    """Refuse a folder that no other can be put in the place of."""
    if folder.exists() and (os.path.ismount(folder) or os.path.samefile(folder, os.curdir)):
        what = "a mount point" if os.path.ismount(folder) else "the current folder"
        raise OutputError(
            f"{folder} is {what}: no finished folder can be put in its place. Give a folder inside of it, "
            f"{folder / 'NAME'} say."
        )


def kept(given: Path, command: str) -> Path | None:
    """Return the place with what a stopped `command` keeps for an output; None if there is none."""
    try:
        staging = Staging(output_folder(given), command)
        return staging.place if staging.resumed_by and staging.is_ours else None
    except OutputError:
        return None


def require_empty(folder: Path) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"{folder} is a file. Give another output folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} already holds something. Give another output folder, or remove this one first.")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there. No link is followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Staging:
    """Hidden folder `.NAME.part` in which an output `NAME` is made; it is someone else's without a marker inside."""

    def __init__(self, output: Path, resumed_by: str = "") -> None:
        self.output = output  # as `output_folder` returned it
        self.resumed_by = resumed_by  # the command that goes on with what a killed process left; empty: none
        self.place = output.parent / f".{output.name}.part"
        self.new, self.old = self.place / "new", self.place / "old"

    @classmethod
    def of_new(cls, given: str | Path, source: Any = None) -> "Staging":
        """Return the place of a new output folder, after all checks that can be made before any work."""
        staging = cls(output_folder(given, source))
        require_empty(staging.output)
        staging.check()
        return staging

    @property
    def is_ours(self) -> bool:
        """True if the place is there, with a marker for this output."""
        return self._marker() is not None

    def check(self) -> None:
        """Refuse, before any work, a place that is not this program's, or that a process or another command uses."""
        was_there, marker = os.path.lexists(self.place), self._marker()
        if marker is None and was_there and os.path.lexists(self.place):  # no other process has just begun, or ended
            raise OutputError(
                f"{self.place} is where {self.output} would be made, and was not made by this program for it. Move it "
                "away, or give another output folder."
            )
        if marker is not None and marker["resumed_by"] not in ("", self.resumed_by):
            raise OutputError(
                f"{self.place} holds an unfinished {marker['resumed_by']} of {self.output}. Finish that with --resume, "
                "or remove this folder."
            )
        if marker is not None:
            with locked(self.place / LOCK, shared=True) as is_free:
                if not is_free:
                    raise self.in_use()

    @contextmanager
    def held(self, *, shared: bool = False) -> Iterator[bool]:
        """Make the place, and hold its lock inside the block; yield False if another process holds the lock."""
        with ExitStack() as stack:
            self._claim()
            while (
                is_free := stack.enter_context(locked(self.place / LOCK, shared=shared))
            ) and not self.is_ours:  # whoever held it has just removed the place
                stack.close()
                self._claim()
            if is_free and not shared:
                with suppress(OSError):  # nothing depends on it: what cannot be written next says why
                    overwrite(self.place / LOCK, f"process {os.getpid()} on {os.uname().nodename}\n")
                self._recover()
            yield is_free

    @contextmanager
    def whole(self, *, is_file: bool = False) -> Iterator[Path]:
        """Yield a new folder, or the name of a new file, for the output; publish it if the block ends well."""
        require_empty(self.output)
        self.check()
        with self.held() as is_free:
            if not is_free:
                raise self.in_use()
            try:
                with writing(self.output):
                    yield self.begin(is_file=is_file)
                self.publish()
            finally:
                self.discard()

    def begin(self, *, is_file: bool = False) -> Path:
        """Make `new` afresh; as a file, only its name."""
        remove(self.new)
        with writing(self.new):
            if not is_file:
                self.new.mkdir()
        return self.new

    def publish(self, require: Callable[[Path], None] | None = None) -> None:
        """Flush `new`, and put it in the place of the output, which is empty, or passes `require` and is removed."""
        with writing(self.output):
            if self.new.is_dir():
                flush(self.new)
            if require is None:
                require_empty(self.output)
            elif self.output.exists():
                publish(self.output, self.old)
                with ExitStack() as put_back:
                    put_back.callback(os.rename, self.old, self.output)
                    require(self.old)
                    put_back.pop_all()
            publish(self.new, self.output)
            remove(self.old)

    def clear(self) -> None:
        """Remove all that is in the place but its marker and its lock."""
        for path in self.place.iterdir():
            if path.name not in (MARKER, LOCK):
                remove(path)

    def discard(self) -> None:
        """Remove the place, its marker last: whenever the process is killed, nothing is left that nobody knows."""
        self.clear()
        gone = self._nameless()
        os.rename(self.place, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def in_use(self) -> OutputError:
        holder = (self.place / LOCK).read_text().strip() or "a rank of a launcher"
        return OutputError(f"Another process works on {self.output} ({holder}). Wait for it, or give another folder.")

    def _marker(self) -> dict[str, Any] | None:
        path = self.place / MARKER
        with writing(path):
            if self.place.is_symlink() or path.is_symlink() or not path.is_file() or path.stat().st_size > LONGEST:
                return None
            match read_notes(path):
                case {"output": self.output.name, "resumed_by": str()} as marker:
                    return marker
        return None

    def _claim(self) -> None:
        """Make the place with its marker by one rename, so that no process ever sees the half of it."""
        if self.is_ours:
            return
        self.check()
        made = self._nameless()
        with writing(self.output):
            make_folder(self.place.parent)
            try:
                made.mkdir()
                write_notes(made / MARKER, {"output": self.output.name, "resumed_by": self.resumed_by})
                publish(made, self.place)
            except OSError as cause:
                remove(made)
                if cause.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                    raise

    def _recover(self) -> None:
        """Put right what a process left that was killed between two renames of `publish`."""
        if self.old.exists():
            if not os.path.lexists(self.output):
                os.rename(self.old, self.output)
            elif self.new.exists():
                raise OutputError(
                    f"{self.old} was to be replaced as {self.output}, and something else is there now. Move one of "
                    "them away."
                )
            remove(self.old)

    def _nameless(self) -> Path:
        return self.place.with_name(f".{secrets.token_hex(8)}.part")
