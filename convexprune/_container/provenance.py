"""Proof, by the checksums in report.json, that a folder is what a run wrote."""

from collections.abc import Iterator
from pathlib import Path

from convexprune._container.file import is_packed, packed_checksum
from convexprune._container.folder import packed_name
from convexprune._runs.folder import PAGE, REPORT, RunFolder
from convexprune._storage.failures import writing
from convexprune._storage.files import paths_in, sha256
from convexprune.errors import ModelError, OutputError

GENERATOR = b'<meta name="generator" content="convexprune">'
"""Tag of a page of this program: no other file is replaced by a page."""
HEAD = 1 << 12  # bytes of a page in which the tag is looked for


def require_only_result(folder: Path) -> None:
    """Refuse a folder that holds anything but the result of a run, as the run wrote it."""
    with writing(folder):
        foreign = list(_foreign(folder))
    if foreign:
        more = f" and {len(foreign) - 3} more" if foreign[3:] else ""
        raise OutputError(
            f"{folder} holds what no run wrote, or what was changed since: {', '.join(foreign[:3])}{more}. Only a run "
            "is overwritten: move these away, or give another folder."
        )


def is_page(path: Path) -> bool:
    """Return True if the file at `path` is a page of this program."""
    with path.open("rb") as file:
        return GENERATOR in file.read(HEAD)


def _foreign(folder: Path) -> Iterator[str]:
    """Yield the names in a folder that no run wrote, and of files that are not as their run wrote them."""
    run = RunFolder(folder)
    if not folder.is_dir() or not run.is_finished:
        yield from (path.name for path in folder.iterdir()) if folder.is_dir() else (folder.name,)
        return
    report = run.report()
    known = report.files | report.documents
    packs = {packed_name(Path(name)).as_posix(): checksum for name, checksum in known.items()}
    folders = {parent for name in known for parent in Path(name).parents}
    for path in paths_in(folder):
        name = path.relative_to(folder)
        is_known = name in folders if path.is_dir() else _is_as_written(path, name.as_posix(), known, packs)
        if path.is_symlink() or not is_known:
            yield name.as_posix()


def _is_as_written(path: Path, name: str, known: dict[str, str], packs: dict[str, str]) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    if name in (REPORT, PAGE):
        return name == REPORT or is_page(path)
    if name in packs and is_packed(path):
        try:
            return packed_checksum(path) == packs[name]
        except ModelError:
            return False
    return known.get(name) == sha256(path)
