"""`evaluate`: perplexity by the conventions of the field, divergence from the dense model, bits per byte, tasks."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from convexprune import adapters
from convexprune._device.machine import default_device
from convexprune._device.memory import within_memory
from convexprune._device.switches import pinned
from convexprune._progress import begin
from convexprune._progress.shown import visible
from convexprune._schema.functions import EVALUATE, Evaluate
from convexprune._schema.parameters import documented
from convexprune.adapters import HuggingFaceModel, load
from convexprune.errors import CalibrationError, ModelError, RecipeError, unknown
from convexprune.report import finite

from ._perplexity import Perplexity, fit, of_model
from ._results import short
from ._texts import TEXTS, TaskScore, evaluate_tasks, is_text_file, require_tasks, text_of

COMMON = 2048  # tokens of a window, in the published perplexities of pruned models
LONGEST = 16384  # tokens of a native window that is measured unasked
OF_C4 = 256  # windows of C4, as published
CHARACTERS = 8  # of a token, at most
SENTENCE = "The 3 quick brown foxes (naïve, odd) jumped over 12 lazy dogs."  # that tells tokenizers apart


@dataclass(frozen=True)
class TextScore:
    text: str
    convention: (
        str  # "common" (`COMMON` tokens, or the limit if less), "native" (the limit), both, "given" or "answers"
    )
    perplexity: Perplexity
    bits_per_byte: float | None  # bits per token over the mean bytes of a token's text; None without a tokenizer
    kl: float | None  # mean over the predicted tokens of KL(dense || model) in nats; None without a dense model
    dense: Perplexity | None


@dataclass(frozen=True)
class Evaluation:
    """The measurements of `evaluate`.

    Args:
        model: name of the model.
        against: name of the dense model, or None.
        texts: scores by text and convention.
        tasks: scores by task and metric.
        left_out: reasons for missing measurements.
    """

    model: str
    against: str | None
    texts: tuple[TextScore, ...]
    tasks: tuple[TaskScore, ...]
    left_out: tuple[str, ...]

    def to_json(self) -> str:
        """Return the evaluation as JSON. Numbers that are not finite become text."""
        return json.dumps(finite(asdict(self)), indent=2, allow_nan=False)

    def tables(self) -> Iterator[Table]:
        """Texts and tasks, for a terminal."""
        beside = self.against is not None
        if self.texts:
            heads = ["text", "windows", "convention", "perplexity", "bits/byte", *(["dense", "KL"] if beside else [])]
            table = Table(*heads, box=SIMPLE_HEAD)
            table.caption = "Windows do not overlap; each token after the first of its window is predicted."
            if any(s.convention == "answers" for s in self.texts):
                table.caption += " Of chats (answers) a window is a chat, and the tokens of the assistant count."
            for s in self.texts:
                p, dense = s.perplexity, [] if s.dense is None else [f"{s.dense.value:.3f}", f"{s.kl:.4f}"]
                cells = [f"{p.windows} x {p.window}", s.convention, f"{p.value:.3f}", short(s.bits_per_byte, ".4f")]
                table.add_row(s.text, *cells, *dense)
            yield table
        if self.tasks:
            table = Table("task", "metric", "value", *(["dense"] if beside else []), box=SIMPLE_HEAD)
            for score in self.tasks:
                table.add_row(score.task, score.metric, *score.shown(beside))
            yield table

    def verdict(self) -> Iterator[str]:
        """Yield the reasons for missing measurements."""
        yield from (f"not measured: {reason}" for reason in self.left_out)


@visible
@pinned()
@documented(EVALUATE)
def evaluate(model: str | Path | PreTrainedModel | None = None, **settings: Any) -> Evaluation:
    """Measure a model as the field compares models: perplexity, bits per byte, and accuracy on tasks of lm-eval.

    Perplexity follows the code of wanda and SparseGPT: the text is tokenised once and cut into windows without overlap;
    a token is predicted from earlier tokens in the window; a rest shorter than a window is dropped. With a dense model
    the divergence from its predictions is measured, too.

    Args:
        model: Folder, or name on the hub. Left out: the small OPT model that is bundled. Or a loaded model: it moves to
            `device`, and is otherwise left as it was.
        settings: by name:
        {settings}

    Returns:
        What was measured.

    Raises:
        ConvexpruneError: see `convexprune.errors`; bad input is refused before any work.
    """
    own, shared = EVALUATE.read({"model": model, **settings} if model is not None else settings)
    _check(own)
    device, chosen = default_device(shared.get("device", "auto")), adapters.bundled_if_none(shared)
    if shared.get("dtype") is not None and any(isinstance(each, PreTrainedModel) for each in (model, own.against)):
        raise RecipeError(f"dtype={shared['dtype']!r}: a loaded model keeps its own. Leave dtype out, or cast it.")
    dtype = None if chosen.get("dtype") is None else getattr(torch, str(chosen["dtype"]))
    trust: dict[str, Any] = {"trust_remote_code": own.trust_remote_code, "allow_changed": own.allow_changed}
    tokenizer = adapters.given_tokenizer(own.tokenizer)
    with within_memory(), ExitStack() as lent:
        begin("loading the model")
        opened = list[HuggingFaceModel]()
        for source in (source for source in (chosen["model"], own.against) if source is not None):
            of_loaded = isinstance(source, PreTrainedModel)
            words = None if opened and not of_loaded else tokenizer
            kept = load(source, device=device, dtype=None if of_loaded else dtype, tokenizer=words, **trust)
            opened.append(lent.enter_context(kept.lent()))
        return _measured(opened, own)


def _check(own: Evaluate) -> None:
    if not own.text and not own.tasks:
        raise RecipeError("Nothing to evaluate on. Give a text (--text FILE, or wikitext2), tasks (--tasks), or both.")
    for text in own.text:
        if text in adapters.CORPORA:
            adapters.datasets_package()
        elif is_text_file(text):
            adapters.read_documents(text)
        elif text not in TEXTS:
            known = f"{unknown('text', text, [*adapters.CORPORA, *TEXTS])} Or give a file"
            raise CalibrationError(f"{known} that ends in {' or '.join(adapters.TEXT_FILES)}.")
    if own.tasks:
        require_tasks(own.tasks, own.tasks_dir)


def _measured(opened: Sequence[HuggingFaceModel], own: Evaluate) -> Evaluation:
    model, *others = opened
    for dense in others:
        _require_comparable(model, dense)
    limit = min(each.max_positions for each in opened)
    if own.window is not None and own.window > limit:
        raise CalibrationError(f"window={own.window}: the models can see {limit} tokens at most.")
    texts, left_out = list[TextScore](), list[str]()
    windows = _conventions(limit, own.window)
    for text in own.text:
        if (chats := _conversations(text)) is not None:
            texts.append(_answers(text, chats[: own.max_windows], opened, min(limit, own.window or limit)))
            continue
        content, known = _content(text, max(window for _, window in windows), own), 0
        for convention, window in windows:
            if convention == "native" and (window > LONGEST or known < window):
                why = f"the text has {known:,} tokens" if known < window else f"ask for it with window={window}"
                left_out.append(f"{text} by native windows of {window:,} tokens: {why}.")
                continue
            tokens = adapters.text_windows(content, model, window, text)
            known = tokens.numel()
            tokens = tokens[: OF_C4 if own.max_windows is None and text == "c4" else own.max_windows]
            *reference, (p, kl) = fit(tokens, *(of_model(each.model) for each in (*others, model)))
            bits = _bits_per_byte(p, tokens, model)
            beside = (kl, reference[0][0]) if reference else (None, None)
            texts.append(TextScore(text, convention, p, bits, *beside))
    found = [_tasks(each, own) for each in opened] if own.tasks else [()]
    scores = found[0] if len(found) == 1 else tuple(a.beside(b) for a, b in zip(*found, strict=True))
    return Evaluation(model.name, others[0].name if others else None, tuple(texts), tuple(scores), tuple(left_out))


def _tasks(model: HuggingFaceModel, own: Evaluate) -> tuple[TaskScore, ...]:
    begin(f"tasks of {model.name}")
    settings = {"num_fewshot": own.num_fewshot, "limit": own.limit, "batch_size": own.task_batch}
    return evaluate_tasks(model, own.tasks, own.tasks_dir, **settings)


def _conversations(text: str) -> list[Any] | None:
    """Return the conversations of a file; None for a text."""
    rows = adapters.read_documents(text).rows if is_text_file(text) else [text]
    return None if all(isinstance(row, str) for row in rows) else list(rows)


def _answers(text: str, chats: Sequence[Any], opened: Sequence[HuggingFaceModel], longest: int) -> TextScore:
    """Measure the assistant's messages, each chat by itself; of a chat that is too long the beginning."""
    (model, *others), tokenizer = opened, opened[0].tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        raise CalibrationError(f"{text} holds conversations, and {model.name} has no chat template. Give text.")
    read = [adapters.answers(chat, tokenizer) for chat in chats]
    length = min(longest, max(len(ids) for ids, _ in read))
    tokens, counted = torch.zeros(len(read), length, dtype=torch.long), torch.zeros(len(read), length, dtype=torch.bool)
    for row, (ids, inside) in enumerate(read):
        kept = min(length, len(ids))
        tokens[row, :kept], counted[row, :kept] = torch.tensor(ids[:kept]), torch.tensor(inside[:kept])
    if not counted[:, 1:].any():
        where = f"an assistant's message in its first {length} tokens. Give a longer window, add answers, or give text."
        raise CalibrationError(f"{text}: no chat has {where}")
    networks = [of_model(each.model) for each in (*others, model)]
    *reference, (p, kl) = fit(tokens, *networks, counted=counted[:, 1:])
    return TextScore(text, "answers", p, None, *((kl, reference[0][0]) if reference else (None, None)))


def _require_comparable(model: HuggingFaceModel, dense: HuggingFaceModel) -> None:
    read = [each.tokenizer(SENTENCE)["input_ids"] for each in (model, dense) if each.tokenizer is not None]
    if dense.vocab_size != model.vocab_size or read[1:] not in ([], read[:1]):
        raise ModelError(
            f"{dense.name} knows {dense.vocab_size} tokens, and {model.name} {model.vocab_size}, or they read text in "
            "different ways: their predictions cannot be compared. Give the dense model that this one was made of."
        )


def _conventions(limit: int, asked: int | None) -> list[tuple[str, int]]:
    """Names and lengths of the windows to measure, of models that can see so many tokens."""
    if asked is not None:
        return [("given", asked)]
    return [("common, native", limit)] if limit <= COMMON else [("common", COMMON), ("native", limit)]


def _content(text: str, longest: int, own: Evaluate) -> str:
    """Return a text: of C4, which is endless, as much as the windows may need."""
    if text not in adapters.CORPORA:
        return text_of(text)
    return adapters.hub_text(
        text, "evaluation", (own.max_windows or OF_C4) * longest * CHARACTERS if text == "c4" else None
    )


def _bits_per_byte(p: Perplexity, tokens: Tensor, model: HuggingFaceModel) -> float | None:
    """Return bits per token, times the tokens of the windows over the bytes of their text; None without a tokenizer."""
    if model.tokenizer is None:
        return None
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = str(model.tokenizer.decode(tokens.flatten().tolist(), **plain))
    return p.nll / log(2) * tokens.numel() / max(1, len(text.encode()))
