"""The model card README.md with the metadata of the hub, the sparsity entry of config.json, and texts of templates."""

import re
import shlex
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PreTrainedModel

from convexprune._recipe_file import GIVEN
from convexprune._runs.folder import CARD
from convexprune._schema.settings import BUNDLED
from convexprune._storage.files import write_text
from convexprune.adapters import CORPORA
from convexprune.report import Report

from .facts import command_of, facts, name_of_model, text_of_evaluation

MARKDOWN = re.compile(r"([\\`*_\[\]<>#|&~$])")


def text_of(template: str, **values: Any) -> str:
    return visible(_environment().get_template(template).render(values))


def markdown(value: object) -> str:
    return MARKDOWN.sub(r"\\\1", _line(value))


def code(value: object) -> str:
    text = _line(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def fenced(text: str, language: str) -> str:
    """Return a code block of Markdown. Backticks in the text cannot end the block."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{fence}{language}\n{text}\n{fence}"


def visible(text: str) -> str:
    """Return a text with a sign in place of each control character; they could rewrite a terminal or hide text."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _line(value: object) -> str:
    return " ".join(str(value).split())


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("convexprune", "_rendering"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., str]] = {"md": markdown, "code": code, "fenced": fenced, "shell": shlex.quote}
    made.filters.update(filters)
    return made


FOLDER, RUN = "DIR", "RUN"  # names in the card of the result's place and, in the card of an export, of the run's
SPARSITY = "sparsity_config"
METRICS = {"value": "perplexity", "kl": "kl divergence from dense"}  # by their names in the report


def sparsity_settings(report: Report) -> dict[str, Any]:
    """Return the sparsity entry of config.json, as compressed-tensors words it; no loader quantizes for this key."""
    if not report.asks_for_zeros:
        return {}
    return {
        SPARSITY: {
            "format": "dense",  # the zeros are stored as other weights are
            "global_sparsity": round(report.sparsity, 6),  # of the operators that were pruned
            "sparsity_structure": report.recipe["pattern"],
            "targets": list(report.recipe["targets"]),
            "ignore": sorted(report.left_alone),
        }
    }


def with_sparsity(report: Report, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.json with the sparsity entry of this result, and of no earlier one."""
    return {name: value for name, value in config.items() if name != SPARSITY} | sparsity_settings(report)


def mark_sparse(model: PreTrainedModel, report: Report) -> None:
    vars(model.config).pop(SPARSITY, None)
    for name, value in sparsity_settings(report).items():
        setattr(model.config, name, value)


def write_card(report: Report, folder: Path, layout: str | None = None) -> Path:
    write_text(folder / CARD, card(report, layout))
    return folder / CARD


def card(report: Report, layout: str | None = None) -> str:
    """Return the model card of a result, or of its export. The report is the only source: no clock, no path."""
    name, zeros = name_of_model(report), f"{report.sparsity:.1%}"
    body = text_of(
        "card.md.jinja",
        title=", ".join([name, *[f"{zeros} of its weights zero"][: report.asks_for_zeros], *_kind(report, layout)]),
        layout=layout,
        model=name,
        hub_name=hub_name(report.recipe.get("model")),
        report=report,
        grid=_grid(report),
        zeros=zeros,
        removed=_removed(str(report.recipe["pattern"])),
        facts=facts(report, "codes and scales" if layout else "their products"),
        folder=FOLDER,
        run=RUN if layout else FOLDER,
        command=command_of(report, RUN if layout else FOLDER),
        window=next((p["window"] for p in report.perplexity.values()), None),
        documents=", ".join(map(code, report.base.get("files", []))),
        licence=_licence(report),
    )
    return f"---\n{visible(metadata(report, layout).to_yaml())}\n---\n\n{body}"


def _grid(report: Report) -> str | None:
    bits = report.recipe.get("bits")
    return report.recipe.get("quantize") or (None if bits is None else f"{bits} bits a weight")


def _kind(report: Report, layout: str | None) -> list[str]:
    return [str(report.recipe["quantize"]), layout] if layout else []


def _removed(pattern: str) -> str:
    kind = re.split("[: ]", pattern)[0]
    return {"layers": "decoder layers", "heads": "attention heads"}.get(kind, kind)


def metadata(report: Report, layout: str | None = None) -> ModelCardData:
    base, pattern = hub_name(report.recipe.get("model")), str(report.recipe.get("pattern"))
    text = str(report.recipe.get("dataset"))  # a file, tokens, or text that the model wrote has no name on the hub
    dataset = CORPORA[text].repository if text in CORPORA else hub_name(text) if "/" in text else None
    zeros: dict[str, Any] = {"sparsity": round(report.sparsity, 6)} if report.asks_for_zeros else {}
    kinds = [re.sub(r"[^\w:.\- ]", "", pattern)] if zeros or report.narrowed or not _grid(report) else []
    kept = {name: value for name, value in report.base.items() if name != "files"}
    return ModelCardData(
        model_name=name_of_model(report),
        base_model=base,
        base_model_relation=base and ("quantized" if layout else "finetune"),  # the hub has no word for pruned models
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["convexprune", *_kind(report, layout), *(["pruned", "sparse"] if zeros else []), *kinds],
        datasets=None if dataset is None else [dataset],
        eval_results=_results(report) or None,
        ignore_metadata_errors=True,
        **zeros,
        **kept,
    )


def hub_name(name: Any) -> str | None:
    """Return the model's name on the hub; None for a folder, the bundled model, or a model in memory."""
    text = str(name)
    if name is None or text == BUNDLED or text.endswith((GIVEN, ".gguf")) or PurePath(text).is_absolute():
        return None
    try:
        validate_repo_id(text)
    except HFValidationError:
        return None
    return text


def _results(report: Report) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=f"{text_of_evaluation(report)}: {p['windows']} windows of {p['window']} tokens",
            metric_type=kind,
            metric_name=f"{kind}, {model}",
            metric_value=round(float(p[key]), 4),
        )
        for key, kind in METRICS.items()
        for model, p in report.perplexity.items()
        if key in p
    ]


def _licence(report: Report) -> str:
    named, link = (report.base.get(name) for name in ("license_name", "license_link"))
    if not (named := named or report.base.get("license")):
        return ""
    said = f"that of the base model: {named if isinstance(named, str) else ', '.join(named)}"
    return f"{said} ({link})" if link else said
