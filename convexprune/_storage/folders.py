"""Folders that appear whole or not at all, and links that lead out of the folder of a model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convexprune._storage.failures import writing
from convexprune._storage.files import flush, make_folder, paths_in, publish
from convexprune._storage.locks import locked
from convexprune._storage.place import beside
from convexprune.errors import ModelError, OutputError


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Write a new folder atomically: it is made under another name, and becomes `folder` if the block ends well.

    What a process that was killed left under that name is removed.
    """
    place = beside(folder, "part")
    whole = place / folder.name
    with writing(folder):
        make_folder(place)
        with locked(place / "lock") as free:
            if not free:
                raise OutputError(f"Another process writes {folder}. Wait for it, or give another folder.")
            try:
                shutil.rmtree(whole, ignore_errors=True)
                whole.mkdir()
                yield whole
                flush(whole)
                publish(whole, folder)
            finally:
                shutil.rmtree(place, ignore_errors=True)


def move_files(place: Path, folder: Path) -> None:
    """Move all files of a folder to another one, flushed; config.json last, so half a model is never one."""
    with writing(folder):
        for path in sorted(paths_in(place), key=lambda path: path.name == "config.json"):
            if path.is_file():
                target = folder / path.relative_to(place)
                make_folder(target.parent)
                publish(path, target)


def refuse_foreign(path: Path, folder: Path) -> None:
    """Check that a file of a model lies in its folder, or among the blobs of the hub's cache."""
    place, target = folder.resolve(), path.resolve()
    blobs = place.parents[1] / "blobs" if place.parent.name == "snapshots" else place
    if not target.is_relative_to(place) and target.parent != blobs:
        raise ModelError(
            f"{path} is a link to {target}, outside of the model's folder, and would be copied to the result. Put "
            "the file itself into the folder, or remove the link."
        )
