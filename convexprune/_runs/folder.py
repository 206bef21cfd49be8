"""The folder of a run: the result, which is whole or not there, and beside it the place where a run is unfinished."""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from convexprune._layerwise.settings import LayerSettings
from convexprune._storage.failures import writing
from convexprune._storage.files import checksum_inside, locked, read_notes, read_text, sha256, write_notes, write_text
from convexprune._storage.staging import Staging, require_empty
from convexprune._storage.tensors import Spec, raw, write_tensors
from convexprune.errors import OutputError
from convexprune.report import Report

logger = logging.getLogger(__name__)
RUN, WORK, FINISH, REPORT = "run.json", "work", "finish.lock", "report.json"
REMOVED = {kind: f"{kind}.json" for kind in ("channels", "heads", "layers", "experts")}  # which were removed for good
CARD, PAGE = "README.md", "report.html"  # what the report says, for people
BLOCKS = "blocks.ggml"  # safetensors, but not to be loaded as weights: bytes of operators on block grids
OWN = (REPORT, PAGE, BLOCKS, *REMOVED.values(), "recipe.yaml")  # not to be names of a model's files
TOKENS = "tokens.safetensors"
PRUNE_AGAIN = "Put back what was written, or remove the folder and prune again."
LONGEST_REPORT = 1 << 28  # bytes; that of 100,000 operators has less
POLL = 0.05  # seconds between two looks at what other processes have done
PATIENCE = 3600.0  # seconds that a rank waits for the first one to begin the run


class RunFolder:
    """The result of a run in a folder, which is empty or passes `replaces`, and the unfinished run beside it."""

    def __init__(self, folder: Path, replaces: Callable[[Path], None] | None = None) -> None:
        self.folder, self.replaces = folder, replaces
        self.staging = Staging(folder, "prune")
        self.work, self._run = self.staging.place / WORK, self.staging.place / RUN

    @property
    def is_finished(self) -> bool:
        return self.replaces is None and (self.folder / REPORT).is_file()

    @property
    def is_unfinished(self) -> bool:
        """True if a run for the folder began and did not end."""
        return not self.is_finished and self.staging.is_ours and self._run.is_file()

    def check(self, resume: bool) -> None:
        """Refuse, before any work, what would be lost. An unfinished run is accepted with `resume`."""
        if self.is_finished:
            if resume:
                return
            raise OutputError(
                f"{self.folder} already holds something: a finished run. Give another output folder, or "
                "overwrite=True (--overwrite)."
            )
        self.staging.check()
        if self.replaces is None:
            require_empty(self.folder)
        elif os.path.lexists(self.folder):
            self.replaces(self.folder)
        if self.replaces is not None and not resume:
            return
        done = len(list((self.work / "layers").glob("*.json"))) if self.staging.is_ours else 0
        if self._begun() is None and done:
            raise OutputError(
                f"{self.staging.place} holds {done} finished layers, but {RUN}, which says of what run, is missing. "
                "Put it back to go on, or remove the folder to begin again."
            )
        if not resume and self.is_unfinished:
            raise OutputError(
                f"{self.staging.place} holds an unfinished run, {done} of its layers finished. Go on with resume=True "
                "(--resume), or begin again with overwrite=True (--overwrite)."
            )

    def restart(self) -> None:
        if self.staging.is_ours:
            with self.staging.held() as is_free:
                if not is_free:
                    raise self.staging.in_use()
                self.staging.discard()

    @contextmanager
    def opened(self, identity: Mapping[str, Any], tokens: Mapping[str, Tensor], rank: int | None) -> Iterator[None]:
        """Begin the run, or go on with it if it is the same. Of several ranks the first begins, the others wait."""
        identity = json.loads(json.dumps(identity))
        try:
            while not self.is_finished:
                with self.staging.held(shared=rank is not None) as is_free:
                    if is_free:
                        self._enter(identity, tokens, rank)
                        yield
                        return
                    if not self.is_finished:
                        raise self.staging.in_use()
            self._require_same(identity, tokens)
            yield
        finally:
            self._tidy_up()

    def sampled(self) -> dict[str, Tensor]:
        """Return the windows that the run began with and that the model wrote; none, with a warning, if damaged."""
        if self._tokens_are_whole():
            return load_file(self.work / TOKENS)
        logger.warning("%s is damaged: the windows that the model wrote are sampled again", self.work / TOKENS)
        return {}

    def report(self) -> Report:
        return Report.from_json(read_text(self.folder / REPORT, LONGEST_REPORT), str(self.folder / REPORT))

    def holds(self, report: Report) -> bool:
        """Return True if the result is that of the run of a `report`, with all its settings, and no other is begun."""
        if self.is_unfinished or not (self.folder / REPORT).is_file():
            return False
        then, now = ([each.identity, each.recipe] for each in (self.report(), report))
        return then == json.loads(json.dumps(now))

    def require_whole(
        self, checksum: Callable[[Path, str], str | None] = checksum_inside, advice: str = PRUNE_AGAIN
    ) -> None:
        """Refuse a result of which a file is missing or damaged, by its `checksum` in a folder."""
        files = self.report().files
        now = {name: checksum(self.folder, name) for name in files}
        if wrong := [
            f"{name} is {'missing' if now[name] is None else 'damaged'}" for name in files if now[name] != files[name]
        ]:
            more = f" and {len(wrong) - 5} more" if wrong[5:] else ""
            raise OutputError(f"{self.folder}: {', '.join(wrong[:5])}{more}, by the checksums in {REPORT}. {advice}")

    def finish(self, report: Report) -> None:
        """Write the report beside the result, which is whole in `staging.new`, and put it into the folder."""
        write_text(self.staging.new / REPORT, report.to_json())
        self.staging.publish(self.replaces)
        self.replaces = None  # from here on the run is finished
        self._run.unlink()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Yield True if this process is the one that has to finish the run; False if another one did."""
        while self.is_unfinished:
            with locked(self.staging.place / FINISH) as is_locked:
                if is_locked and self.is_unfinished:
                    yield True
                    return
            time.sleep(POLL)
        yield False

    def _tidy_up(self) -> None:
        """Remove what only the finished run needed, unless another process works on it, or it is another run."""
        if self.is_finished and self.staging.is_ours:
            with self.staging.held() as is_last:
                if is_last and (not self._run.exists() or read_notes(self._run) == self.report().identity):
                    self.staging.discard()

    def _enter(self, identity: Mapping[str, Any], tokens: Mapping[str, Tensor], rank: int | None) -> None:
        if rank:
            self._wait()
        elif not self.is_unfinished and not self.is_finished:
            self.staging.clear()
            with writing(self.work):
                self.work.mkdir()
            self._keep(tokens)
            write_notes(self._run, identity)
        self._require_same(identity, tokens)
        if not rank and self.is_unfinished and not self._tokens_are_whole():
            self._keep(tokens)

    def _keep(self, tokens: Mapping[str, Tensor]) -> None:
        specs = {name: Spec.of(windows) for name, windows in tokens.items()}
        write_tensors(self.work / TOKENS, specs, tokens.__getitem__, {})
        write_notes((self.work / TOKENS).with_suffix(".json"), sha256(self.work / TOKENS))

    def _tokens_are_whole(self) -> bool:
        kept = read_notes((self.work / TOKENS).with_suffix(".json"))
        return kept is not None and kept == sha256(self.work / TOKENS)

    def _begun(self) -> Any:
        """Return the identity that the unfinished run began with; None if there is no such run."""
        for _ in range(2):  # another process may begin or finish the run meanwhile
            if (then := read_notes(self._run)) is not None or not self.is_unfinished:
                return then
        raise OutputError(
            f"{self._run} is damaged, or of another release: it does not say any more what run this is. Put back what "
            "was written to go on, or remove the folder to begin again."
        )

    def _wait(self) -> None:
        until = time.monotonic() + PATIENCE
        while not self.is_unfinished and not self.is_finished:
            if time.monotonic() > until:
                raise OutputError(f"{self.folder}: the first process has not begun the run. Did it fail?")
            time.sleep(POLL)

    def _require_same(self, identity: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> None:
        then = None if self.is_finished else self._begun()
        if then is None and self.is_finished:  # also if another rank has just finished it
            then = self.report().identity
            if not then:
                raise OutputError(
                    f"{self.folder} holds a result that was saved from memory: there is no run to go on with. Give "
                    "another output folder."
                )
        differing = differences(then or {}, identity)
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


UNSEEN = ("model", "device", "evaluation")  # of a recipe, in which two runs may differ: compared itself, or no matter


def identity(
    recipe: Mapping[str, Any],
    settings: LayerSettings,
    weights: Mapping[str, str],
    tokens: Mapping[str, Tensor],
    installed: Mapping[str, str],
    **numerics: Any,
) -> dict[str, Any]:
    """Return everything that decides the bits of a result: a run is resumed only if all is the same."""
    installed = dict(installed)
    plain = {name: value for name, value in recipe.items() if name not in UNSEEN}
    pruner = re.sub(r" at 0x[0-9a-f]+", "", repr(settings.pruner))  # a user's solver may show its address
    return {
        "recipe": plain | {"pruner": pruner},
        "weights": dict(weights),
        "tokens": {name: checksum(t) for name, t in tokens.items()},
        "code": installed.pop("code"),
        "numerics": numerics | installed,
    }


def checksum(tensor: Tensor) -> str:
    return hashlib.sha256(raw(tensor)).hexdigest()


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """List the differences between two structures of JSON, as "name: then, now"; for checksums only the name."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [*then, *(key for key in now if key not in then)]
        parts = (differences(then.get(k), now.get(k), f"{name}.{k}" if name else k) for k in keys)
        return [line for part in parts for line in part]
    if then == now:
        return []
    if _is_checksum(then) or _is_checksum(now):
        return [f"{name} (missing now)" if now is None else f"{name} (new)" if then is None else name]
    return [f"{name}: {_short(then)} then, {_short(now)} now"]


def _is_checksum(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
