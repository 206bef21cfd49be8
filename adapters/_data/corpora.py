"""Text from the hub for calibration and evaluation: three corpora by short name, and any data set by full name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from convexprune.errors import CalibrationError, DependencyError, install_hint, unknown

from .text_files import Documents, is_conversation

Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Corpus:
    """Files of a data set on the hub, fixed by a commit so that a run can be repeated."""

    repository: str
    revision: str  # the commit, or a branch where there is only that
    calibration: str  # path of the file to calibrate on
    evaluation: str  # path of the file to evaluate on
    column: str
    separator: str
    rows: Mapping[Split, int] = field(default_factory=dict)  # texts in a file, where the revision is only a branch

    def file(self, split: Split) -> str:
        """The path in the repository for a `split`: no file is both calibrated and evaluated on."""
        return self.calibration if split == "calibration" else self.evaluation


CORPORA = {
    "c4": Corpus(
        repository="allenai/c4",
        revision="607bd4c8450a42878aa9ddc051a65a055450ef87",
        calibration="en/c4-train.00000-of-01024.json.gz",
        evaluation="en/c4-validation.00000-of-00008.json.gz",
        column="text",
        separator="\n\n",
    ),
    "wikitext2": Corpus(
        repository="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        calibration="wikitext-2-raw-v1/train-00000-of-00001.parquet",
        evaluation="wikitext-2-raw-v1/test-00000-of-00001.parquet",
        column="text",
        separator="\n\n",
    ),
    # The repository itself is a script, which `datasets` no longer runs; this branch is the hub's own conversion of
    # it, which the hub has stopped renewing; a branch can move, so what is in it is counted.
    "ptb": Corpus(
        repository="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        calibration="penn_treebank/train/0000.parquet",
        evaluation="penn_treebank/test/0000.parquet",
        column="sentence",
        separator=" ",  # as in the published perplexities
        rows={"calibration": 42068, "evaluation": 3761},  # as the card of the data set says
    ),
}


def hub_text(name: str, split: Split, characters: int | None) -> str:
    return hub_documents(name, split, characters).text(None)[0]


def hub_documents(
    name: str, split: Split, characters: int | None, column: str | None = None, revision: str | None = None
) -> Documents:
    """Return the first rows of a data set on the hub, in order: about so many characters, or all."""
    datasets = datasets_package()
    corpus = CORPORA.get(name)
    try:
        if corpus is None:
            at = {} if revision is None else {"revision": revision}
            rows = _split_of(datasets.load_dataset(name, **at), split)
        else:
            # The card's own counts are of whole splits, not of the one file that is read.
            rows = datasets.load_dataset(
                corpus.repository,
                revision=corpus.revision,
                data_files={"train": corpus.file(split)},
                split="train",
                verification_mode="no_checks",
            )
            if len(rows) != corpus.rows.get(split, len(rows)):
                raise ValueError(f"{len(rows)} texts where there were {corpus.rows[split]}: the files have changed")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as cause:
        raise CalibrationError(
            f"{name}: the data set cannot be loaded ({type(cause).__name__}: {cause}). Is the name right and the hub "
            'within reach? dataset="self", a text file or token ids need no network.'
        ) from cause
    column = corpus.column if corpus is not None else _column(name, rows.features, column)
    chosen = _beginning((row[column] for row in rows), characters)
    if not all(isinstance(row, str) or is_conversation(row) for row in chosen):
        raise CalibrationError(f"{name}: column {column!r} holds neither text nor messages with role and content.")
    return Documents(chosen, "\n\n" if corpus is None else corpus.separator)


def datasets_package() -> Any:
    try:
        import datasets
    except ImportError as cause:
        raise DependencyError(f"Data sets on the hub need: {install_hint('hub')}") from cause
    return datasets


def _split_of(splits: Mapping[str, Any], split: Split) -> Any:
    """Return the split for this purpose; a split under an unusual name is not guessed."""
    wanted = ("train",) if split == "calibration" else ("test", "validation")
    for name in wanted:
        if name in splits:
            return splits[name]
    raise ValueError(f"for {split} it needs a split {' or '.join(wanted)}; it has {', '.join(splits)}")


def _column(name: str, features: Mapping[str, Any], asked: str | None) -> str:
    """Return the column that is asked for, or that is likely to be meant."""
    if asked is not None:
        if asked not in features:
            raise CalibrationError(f"{name}: {unknown('column', asked, list(features))}")
        return asked
    columns = [column for column, kind in features.items() if getattr(kind, "dtype", None) == "string"]
    likely = [column for column in ("text", *columns, "messages") if column in features]
    if not likely or (likely[0] == "text" and "text" not in columns):
        raise CalibrationError(f"{name}: no column of text among {', '.join(features)}. Name one: {name}#COLUMN.")
    return likely[0]


def _beginning(rows: Iterable[Any], characters: int | None) -> list[Any]:
    chosen, total = [], 0
    for row in rows:
        chosen.append(row)
        total += len(row if isinstance(row, str) else str(row))
        if characters is not None and total >= characters:
            break
    return chosen
