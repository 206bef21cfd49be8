"""Text from the hub for calibration and evaluation: three corpora by short name, and any data set by full name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from convexprune.errors import CalibrationError, DependencyError, install_hint

Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Corpus:
    """Files of a data set on the hub, fixed by a commit so that a run can be repeated.

    Args:
        revision: the commit, or a branch where there is only that.
        calibration: path of the file to calibrate on.
        evaluation: path of the file to evaluate on.
        rows: how many texts each file must have, where the revision is only a branch.
    """

    repository: str
    revision: str
    calibration: str
    evaluation: str
    column: str
    separator: str
    rows: Mapping[Split, int] = field(default_factory=dict)

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
    """Return the beginning of a data set on the hub, in order.

    Args:
        name: a key of `CORPORA`, or the name of any data set ("organisation/name"), whose first column of text is read.
        characters: approximate number of characters; None means all.
    """
    datasets = datasets_package()
    corpus = CORPORA.get(name)
    try:
        if corpus is None:
            rows = _split_of(datasets.load_dataset(name), split)
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
    column = _text_column(name, rows.features) if corpus is None else corpus.column
    return _beginning((row[column] for row in rows), "\n\n" if corpus is None else corpus.separator, characters)


def datasets_package() -> Any:
    """The package that reads data sets of the hub."""
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


def _text_column(name: str, features: Mapping[str, Any]) -> str:
    columns = [column for column, kind in features.items() if getattr(kind, "dtype", None) == "string"]
    if not columns:
        raise CalibrationError(f"{name}: no column of text among {', '.join(features)}. Give the texts as a list.")
    return "text" if "text" in columns else columns[0]


def _beginning(texts: Iterable[str], separator: str, characters: int | None) -> str:
    chosen, total = [], 0
    for text in texts:
        chosen.append(text)
        total += len(text)
        if characters is not None and total >= characters:
            break
    return separator.join(chosen)
