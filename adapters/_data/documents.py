"""Documents: texts and conversations as a tokenizer reads them, out of files and from the hub."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from convexprune.errors import CalibrationError, DependencyError, install_hint, shown, unknown

FIELDS = ("role", "content")


class Documents(NamedTuple):
    """The rows of a data set, all texts or all conversations, and the text between texts."""

    rows: Sequence[Any]  # texts, or lists of messages {"role": ..., "content": ...}
    separator: str = "\n\n"

    def text(self, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, bool]:
        """Return all rows as one text, and whether the tokenizer is to begin it: a chat template begins its own."""
        if all(isinstance(row, str) for row in self.rows):
            return _utf8(self.separator.join(self.rows)), True
        for row in self.rows:
            if not is_conversation(row):
                raise CalibrationError(f"{shown(str(row)[:60])} is no list of messages with role and content.")
        if tokenizer is None or not tokenizer.chat_template:
            raise CalibrationError(
                "The data set holds conversations, and the tokenizer has no chat template. Take an instruct model, or "
                "write the conversations as text."
            )
        return "".join(_rendered(row, tokenizer) for row in self.rows), False


def is_conversation(row: Any) -> bool:
    if not isinstance(row, Sequence) or isinstance(row, str) or not row:
        return False
    return all(isinstance(each, Mapping) and all(isinstance(each.get(field), str) for field in FIELDS) for each in row)


def _rendered(conversation: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    try:
        rendered = str(tokenizer.apply_chat_template(list(conversation), tokenize=False, **options))
    except Exception as cause:  # a template raises what it likes
        raise CalibrationError(
            f"The chat template refuses the conversation that begins {shown(str(conversation)[:60])} ({cause})."
        ) from cause
    return _utf8(rendered)


def _utf8(text: str) -> str:
    """Refuse a text that has no bytes: JSON may hold half of a surrogate pair, an emoji that was cut say."""
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        near = ascii(text[max(0, cause.start - 20) : cause.end + 20])
        raise CalibrationError(
            f"The data set holds half of a character, {text[cause.start]!a}, which no tokenizer reads: {near}. "
            "Remove it."
        ) from cause
    return text


def answers(conversation: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and True for those of the assistant's messages."""
    whole, spans = _rendered(conversation, tokenizer), list[tuple[int, int]]()
    for number, message in enumerate(conversation):
        if message["role"] == "assistant":
            before, after = conversation[:number], conversation[: number + 1]
            if before:
                begin = len(_rendered(before, tokenizer, add_generation_prompt=True))
            else:  # templates refuse no messages
                begin = max(0, whole.find(message["content"].strip()))
            spans.append((begin, len(_rendered(after, tokenizer))))
    read: Any = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    inside = [any(begin <= first < end for begin, end in spans) for first, _ in read["offset_mapping"]]
    return list(read["input_ids"]), inside


TEXT_FILES = (".txt", ".jsonl")
UTF16 = "It is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8."
BEGINNINGS = {
    b"\x1f\x8b": "It is compressed. Unpack it: gunzip.",
    b"\xff\xfe\0\0": "It is UTF-32. Convert it: iconv -f UTF-32 -t UTF-8.",
    b"\xff\xfe": UTF16,
    b"\xfe\xff": UTF16,
}
OTHER = "If it is Latin-1: iconv -f LATIN1 -t UTF-8."


def is_file(text: str) -> bool:
    """Return True if `text` is a path: it ends like a text file's, or leads to something."""
    return text.endswith(TEXT_FILES) or (bool(text) and exists(text))


def exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a text too long for a path, say
        return False


def split_field(source: str | Path) -> tuple[Path, str | None]:
    """Split FILE#FIELD into the file and the field."""
    name, _, field = str(source).partition("#")
    return (Path(source), None) if is_file(str(source)) or not is_file(name) else (Path(name), field or None)


def read_documents(source: str | Path) -> Documents:
    """Return a .txt file as a text, or a .jsonl file's texts or conversations; FILE#FIELD names another field."""
    if not str(source):
        raise CalibrationError(f"'' names no text. Give a file that ends in {' or '.join(TEXT_FILES)}.")
    path, field = split_field(source)
    if path.suffix not in TEXT_FILES:
        there = f"{path} exists; " if is_file(str(path)) else f"{shown(str(path))}: "
        raise CalibrationError(f"{there}files of text end in {' or '.join(TEXT_FILES)}. Give such a file.")
    if field and path.suffix == ".txt":
        raise CalibrationError(f"{source}: a .txt file is one text without fields. Give {path}, or a .jsonl file.")
    try:
        content = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError) as cause:
        raise CalibrationError(f"{path}: cannot be read ({getattr(cause, 'strerror', cause)}).") from cause
    except UnicodeDecodeError as cause:
        mend = next((how for begin, how in BEGINNINGS.items() if cause.object.startswith(begin)), OTHER)
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({cause}). {mend}") from cause
    if "\0" in content:
        raise CalibrationError(f"{path}: holds NUL bytes, so it is no UTF-8 text. Is it UTF-16, or no text at all?")
    if path.suffix == ".txt":
        return Documents([content])
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    rows = [_row(path, number, line, field) for number, line in lines]
    if len({type(row) for row in rows}) > 1:
        raise CalibrationError(f"{path}: some lines hold text and some conversations. Give two files, a.jsonl,b.jsonl.")
    return Documents(rows)


def read_text(path: str | Path) -> str:
    """Return the text of a file that holds no conversations."""
    documents = read_documents(path)
    if not all(isinstance(row, str) for row in documents.rows):
        raise CalibrationError(f"{path} holds conversations, and text is needed here.")
    return documents.text(None)[0]


def _row(path: Path, number: int, line: str, field: str | None) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as cause:  # also of a number or a nesting that is too long
        why = f"not JSON that can be read ({cause})"
        raise CalibrationError(f"{path}, line {number}: {why}. Mend or remove it.") from cause
    name = field or ("messages" if isinstance(row, dict) and "text" not in row and "messages" in row else "text")
    value = row.get(name) if isinstance(row, dict) else None
    if isinstance(value, str) or is_conversation(value):
        return value
    if isinstance(row, dict):
        found = f"the fields {', '.join(map(shown, row))}"
        found += f", and {type(row[name]).__name__} in that one" if name in row else ""
    else:
        found = f"a value of type {type(row).__name__}"
    raise CalibrationError(
        f'{path}, line {number}: needs an object with a field "{name}" that holds text, or messages with role and '
        f'content; it has {found}. Write every line as {{"text": "..."}}, or name another field: {path}#FIELD.'
    )


Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Corpus:
    """Files of a data set on the hub, fixed by a commit so that a run can be repeated."""

    repository: str
    revision: str  # the commit, or a branch where there is only that
    files: Mapping[Split, str]  # paths in the repository: no file is both calibrated and evaluated on
    column: str
    separator: str
    rows: Mapping[Split, int] = field(default_factory=dict)  # texts in a file, where the revision is only a branch


CORPORA = {
    "c4": Corpus(
        repository="allenai/c4",
        revision="607bd4c8450a42878aa9ddc051a65a055450ef87",
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        column="text",
        separator="\n\n",
    ),
    "wikitext2": Corpus(
        repository="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        files={
            "calibration": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
            "evaluation": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        },
        column="text",
        separator="\n\n",
    ),
    # The repository itself is a script, which `datasets` no longer runs; this branch is the hub's own conversion of
    # it, which the hub has stopped renewing; a branch can move, so what is in it is counted.
    "ptb": Corpus(
        repository="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        files={
            "calibration": "penn_treebank/train/0000.parquet",
            "evaluation": "penn_treebank/test/0000.parquet",
        },
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
                data_files={"train": corpus.files[split]},
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
