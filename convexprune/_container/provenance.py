"""Proof, by the checksums in report.json, that a folder is what a run wrote."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convexprune._container.file import SUFFIX, is_packed, packed_checksum, packed_name
from convexprune._runs.folder import PAGE, REPORT, RunFolder
from convexprune._storage.failures import reading, writing
from convexprune._storage.files import Stamp, checksum_inside, paths_in, read_json, require_unchanged, sha256
from convexprune.errors import ModelError, OutputError

GENERATOR = b'<meta name="generator" content="convexprune">'
"""Tag of a page of this program: no other file is replaced by a page."""
HEAD = 1 << 12  # bytes of a page in which the tag is looked for


READ = (SUFFIX, ".json", ".bin", ".gguf", ".model", ".jinja", ".txt", ".py")
"""Ends of the names of files that decide what a model is."""
TAKE_IT = "take it as it is with allow_changed=True (--allow-changed)."
AS_IT_IS = f"Put back what was written, or {TAKE_IT}"
OF_REPORT = {"checksum", "operators", "recipe", "left_alone"}
"""Keys of our report.json. With none of these keys the file is another program's."""


@contextmanager
def unchanged(folder: Path, allow_changed: bool, name: str | None = None) -> Iterator[None]:
    """Refuse a model, or its single file `name`, that changes inside the block, and a result that is not as written."""
    with reading(folder):
        paths = [*folder.iterdir(), *folder.rglob(f"*{SUFFIX}")] if name is None else [folder / name]
        stamps = {path: Stamp.of(path) for path in paths if path.suffix in READ and path.is_file()}
    if name is None:
        require_as_written(folder, allow_changed)
    yield
    require_unchanged(stamps)


def require_as_written(folder: Path, allow_changed: bool = False) -> None:
    """Refuse a folder whose files are not those of its report, unless that is allowed."""
    if allow_changed or not holds_report(folder):
        return
    run = RunFolder(folder)
    try:
        known = run.report().files
    except OutputError as error:
        raise OutputError(f"{error} Or {TAKE_IT}") from error
    run.require_whole(plain_checksum, AS_IT_IS)
    packs = {packed_name(Path(name)).as_posix() for name in known}
    weights = (path.name for path in sorted(folder.glob(f"*{SUFFIX}")))
    if known and (new := [name for name in weights if name not in {*known, *packs}]):
        raise OutputError(f"{folder}: {', '.join(new[:5])} was not written by the run of {REPORT}. {AS_IT_IS}")


def holds_report(folder: Path) -> bool:
    """Return True if a folder has a report of a run, damaged or not; False for a file of another program."""
    if not (folder / REPORT).is_file():
        return False
    report = read_json(folder / REPORT)
    return not (report and isinstance(report, dict) and OF_REPORT.isdisjoint(report))


def plain_checksum(folder: Path, name: str) -> str | None:
    packed = str(packed_name(Path(name)))
    if packed != name and checksum_inside(folder, packed) is not None:
        return packed_checksum(folder / packed)
    return checksum_inside(folder, name)


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
