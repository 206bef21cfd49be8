"""A run in place of another: it works beside the old one, which stays until the new one is whole."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from convexprune._container.folder import packed_name, plain_checksum
from convexprune._runs.folder import LOCK, OWN, RUN, WORK, RunFolder
from convexprune._storage.failures import working
from convexprune._storage.files import PARTS, paths_in
from convexprune._storage.locks import locked
from convexprune._storage.place import beside, output_folder
from convexprune.errors import OutputError


class Replacement:
    """What is to take the `place` of the run that is there, if any; `new` is where it is made meanwhile."""

    def __init__(self, place: Path) -> None:
        self.place, self.new = place, output_folder(beside(place))
        self.old = beside(place, "old")

    def check(self) -> None:
        """Refuse, before any work, to replace what no run wrote, or one that goes on."""
        for folder in (self.place, self.new, self.old):
            _require_ours(folder)
        if os.path.ismount(self.place):
            raise OutputError(f"{self.place} is a mount point, which cannot be replaced. Give a folder inside of it.")

    def clear(self, resume: bool) -> None:
        """Put right what an earlier call left when it was killed.

        Args:
            resume: whether its unfinished run is to go on.
        """
        if self.old.exists() and not self.place.exists():  # it was killed between two renames
            os.rename(self.old, self.place)
        shutil.rmtree(self.old, ignore_errors=True)
        if not resume:
            shutil.rmtree(self.new, ignore_errors=True)

    def take_place(self) -> None:
        """Put the new run, which is whole, where the old one is, and remove that."""
        self.check()
        if self.place.exists():
            os.rename(self.place, self.old)
        os.rename(self.new, self.place)
        shutil.rmtree(self.old, ignore_errors=True)


def _require_ours(folder: Path) -> None:
    """Refuse a folder in which something is not a run's, or which a process works on."""
    with working(folder):
        foreign = [] if not folder.exists() else list(_foreign(RunFolder(folder)))
    if foreign:
        more = f" and {len(foreign) - 3} more" if foreign[3:] else ""
        raise OutputError(
            f"{folder} holds what no run wrote, or what was changed since: {', '.join(foreign[:3])}{more}. Only a run "
            "is overwritten: move these away, or give another folder."
        )
    if (folder / LOCK).exists():
        with locked(folder / LOCK) as free:
            if not free:
                raise OutputError(f"Another process works on {folder}. Wait for it, or give another folder.")


def _foreign(run: RunFolder) -> Iterator[str]:
    """The files in a folder that are no run's, or not as it wrote them."""
    if not run.folder.is_dir() or not (run.is_finished or run.is_unfinished):
        yield from (path.name for path in run.folder.iterdir()) if run.folder.is_dir() else (run.folder.name,)
        return
    files = run.result()
    ours = {*OWN, *files, *(packed_name(Path(name)).as_posix() for name in files)}
    works = run.is_unfinished or (run.work / RUN).is_file()
    for path in paths_in(run.folder):
        name = path.relative_to(run.folder)
        is_work = (works and name.parts[0] == WORK) or path.match(PARTS)
        if not (is_work or name.as_posix() in ours or (path.is_dir() and not path.is_symlink())):
            yield name.as_posix()
    yield from (name for name, known in files.items() if plain_checksum(run.folder, name) not in (None, known))
