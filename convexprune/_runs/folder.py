"""The folder of a run: empty, unfinished (it holds run.json) or finished; refused if it is another run's."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from convexprune._runs.identity import differences
from convexprune._storage.failures import writing
from convexprune._storage.files import PARTS, atomic_write, checksum_inside, make_folder, sha256, write
from convexprune._storage.folders import move_files
from convexprune._storage.locks import locked, overwrite
from convexprune._storage.notes import read_notes, read_text, write_notes
from convexprune._storage.tensors import Spec, write_tensors
from convexprune.errors import OutputError
from convexprune.report import Report

logger = logging.getLogger(__name__)
RUN, WORK, LOCK, FINISH, REPORT = "run.json", "work", "run.lock", "finish.lock", "report.json"
REMOVED = {kind: f"{kind}.json" for kind in ("channels", "heads", "layers", "experts")}  # which were removed for good
CARD, PAGE = "README.md", "report.html"  # what the report says, for people
OWN = (RUN, LOCK, FINISH, REPORT, PAGE, *REMOVED.values(), "recipe.yaml")  # not to be names of a model's files
TOKENS, RESULT = "tokens.safetensors", "result.json"
LONGEST_REPORT = 1 << 28  # bytes; that of 100,000 operators has less
POLL = 0.05  # seconds between two looks at what other processes have done
PATIENCE = 3600.0  # seconds that a rank waits for the first one to begin the run


def check_output(folder: Path) -> None:
    """Refuse, before any work, a folder that holds something."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise OutputError(f"{folder} already holds something. Give another output folder, or remove this one first.")


class RunFolder:
    """The output `folder` of a run and what it says of itself; `work` is for what is between the layers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / WORK

    @property
    def is_unfinished(self) -> bool:
        """Whether a run began here and did not end."""
        return (self.folder / RUN).is_file()

    @property
    def is_finished(self) -> bool:
        """Whether a result lies here."""
        return not self.is_unfinished and (self.folder / REPORT).is_file()

    def check(self, resume: bool) -> None:
        """Refuse, before any work, a folder that holds what would be lost.

        Args:
            resume: whether an unfinished run may be there.
        """
        done = len(list((self.work / "layers").glob("*.json")))  # first: until they are gone, the rest stays
        if self.folder.exists() and not (self.folder.is_dir() and self._is_ours()):  # another rank may begin it now
            check_output(self.folder)
        if not resume and self.is_finished:
            raise OutputError(
                f"{self.folder} already holds something: a finished run. Give another output folder, or "
                "overwrite=True (--overwrite)."
            )
        if self._begun() is None and not self.is_finished and done:
            raise OutputError(
                f"{self.folder} holds {done} finished layers, but {RUN}, which says of what run, is missing. Put it "
                "back to go on, or remove the folder to begin again."
            )
        if not resume and self.is_unfinished:
            with locked(self.folder / LOCK, shared=True) as free:
                if not free:
                    raise self._in_use()
            raise OutputError(
                f"{self.folder} holds an unfinished run, {done} of its layers finished. Go on with resume=True "
                "(--resume), or begin again with overwrite=True (--overwrite)."
            )

    @contextmanager
    def opened(self, identity: Mapping[str, Any], tokens: Mapping[str, Tensor], rank: int | None) -> Iterator[None]:
        """Begin the run, or go on with it if it is the same; meanwhile no other process can.

        Args:
            rank: the process's number if several open the folder on purpose: the first begins, the others wait for it.
        """
        with writing(self.folder):
            make_folder(self.folder)
        try:
            with self._held(shared=rank is not None):
                if rank is None:
                    overwrite(self.folder / LOCK, f"process {os.getpid()} on {os.uname().nodename}\n")
                if rank:
                    self._wait()
                elif not self.is_unfinished and not self.is_finished:
                    self._begin(identity, tokens)
                self._require_same(identity, tokens)
                if not rank and self.is_unfinished and not self._tokens_are_whole():
                    self._keep(tokens)
                yield
        finally:
            self._tidy_up()

    def sampled(self) -> dict[str, Tensor]:
        """The windows that the run began with and that the model wrote; none, and a warning, if they are damaged."""
        if self._tokens_are_whole():
            return load_file(self.work / TOKENS)
        logger.warning("%s is damaged: the windows that the model wrote are sampled again", self.work / TOKENS)
        return {}

    def report(self) -> Report:
        """The report of the finished run."""
        return Report.from_json(read_text(self.folder / REPORT, LONGEST_REPORT), str(self.folder / REPORT))

    def require_whole(self, checksum: Callable[[Path, str], str | None] = checksum_inside) -> None:
        """Check that every file of a finished run is as it was written.

        Args:
            checksum: gives the sha256 of a file, by the folder and its name; None if it is missing.
        """
        files = self.report().files
        faults = (_fault(name, known, checksum(self.folder, name)) for name, known in files.items())
        if wrong := [fault for fault in faults if fault]:
            raise OutputError(
                f"{self.folder}: {', '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if wrong[5:] else ''}, by the "
                f"checksums in {REPORT}. Put back what was written, or remove the folder and prune again."
            )

    def result(self) -> dict[str, str]:
        """The files of the result, packed or not.

        Returns:
            The sha256 of each by its name; of an unfinished run, of those that may lie here already.
        """
        if self.is_finished:
            report = self.report()
            return report.files | report.documents
        return read_notes(self.work / RESULT) or {}

    def discard_result(self) -> None:
        """Remove from the `folder` what an unfinished run that was killed had of its result."""
        for name in self.result():
            (self.folder / name).unlink(missing_ok=True)

    def finish(self, place: Path, report: Report) -> None:
        """Move the result here, write the report, and let go of all that was only for the run."""
        write_notes(self.work / RESULT, report.files | report.documents)  # whatever happens from here on, they are ours
        move_files(place, self.folder)
        with atomic_write(self.folder / REPORT) as file:
            write(file, report.to_json().encode())
        os.replace(self.folder / RUN, self.work / RUN)  # from here on it is finished

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Inside, this process is the only one to finish the run; false if another one has."""
        while self.is_unfinished:
            with locked(self.folder / FINISH) as is_locked:
                if is_locked and self.is_unfinished:
                    yield True
                    return
            time.sleep(POLL)
        yield False

    @contextmanager
    def _held(self, shared: bool) -> Iterator[None]:
        """The lock on the folder; who holds it in a finished run only tidies up, and is waited for."""
        while True:
            with locked(self.folder / LOCK, shared=shared) as is_locked:
                if is_locked:
                    yield
                    return
                if not self.is_finished:
                    raise self._in_use()
            time.sleep(POLL)

    def _in_use(self) -> OutputError:
        holder = (self.folder / LOCK).read_text().strip() or "a rank of a launcher"
        return OutputError(f"Another process works on {self.folder} ({holder}). Wait for it, or give another folder.")

    def _tidy_up(self) -> None:
        """Of a finished run, remove all that was only for the run, unless another process still works on it."""
        if self.is_finished:
            with locked(self.folder / LOCK) as last:
                if last:
                    shutil.rmtree(self.work, ignore_errors=True)
                    for path in (*self.folder.glob(PARTS), self.folder / FINISH, self.folder / LOCK):
                        path.unlink(missing_ok=True)

    def _begin(self, identity: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        with writing(self.work):
            self.work.mkdir()
        self._keep(tokens)
        write_notes(self.folder / RUN, json.loads(json.dumps(identity)))

    def _keep(self, tokens: Mapping[str, Tensor]) -> None:
        specs = {name: Spec.of(windows) for name, windows in tokens.items()}
        write_tensors(self.work / TOKENS, specs, tokens.__getitem__, {})
        write_notes((self.work / TOKENS).with_suffix(".json"), sha256(self.work / TOKENS))

    def _tokens_are_whole(self) -> bool:
        kept = read_notes((self.work / TOKENS).with_suffix(".json"))
        return kept is not None and kept == sha256(self.work / TOKENS)

    def _begun(self) -> Any:
        """What the unfinished run here began with; None if there is none."""
        for _ in range(2):  # another process may begin or finish the run meanwhile
            if (then := read_notes(self.folder / RUN)) is not None or not self.is_unfinished:
                return then
        raise OutputError(
            f"{self.folder / RUN} is damaged, or of another release: it does not say any more what run this is. Put "
            "back what was written to go on, or remove the folder to begin again."
        )

    def _wait(self) -> None:
        until = time.monotonic() + PATIENCE
        while not self.is_unfinished and not self.is_finished:
            if time.monotonic() > until:
                raise OutputError(f"{self.folder}: the first process has not begun the run. Did it fail?")
            time.sleep(POLL)

    def _require_same(self, identity: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> None:
        then = self._begun()
        if then is None and self.is_finished:  # also if another rank has just finished it
            then = self.report().identity
        differing = differences(then or {}, json.loads(json.dumps(identity)))
        lost = [name for name in tokens if f"tokens.{name}" in differing] if self.is_unfinished else []
        if lost and not self._tokens_are_whole():
            raise OutputError(
                f"{self.work / TOKENS} is damaged, and the text that the model writes here is another than that of the "
                "run. Put the file back to go on, or remove the folder to begin again."
            )
        if differing:
            raise OutputError(
                f"{self.folder} holds another run; it differs in {'; '.join(differing)}. Go on with what it began "
                "with, or give another output folder."
            )

    def _is_ours(self) -> bool:
        names = {path.name for path in self.folder.iterdir() if not path.match(PARTS)}
        return self.is_unfinished or self.is_finished or names <= {WORK, LOCK, FINISH}


def _fault(name: str, known: str, found: str | None) -> str:
    """What is wrong with a file of the result; nothing if it is as it was written."""
    return "" if found == known else f"{name} is {'missing' if found is None else 'damaged'}"
