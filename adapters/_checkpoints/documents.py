"""Card and licence of the base model, which are copied to the result."""

import logging
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from convexprune._storage.failures import reading
from convexprune._storage.files import refuse_foreign
from convexprune._storage.notes import read_text
from convexprune.errors import OutputError, shown

CARD = re.compile(r"README(-base)*\.md")
LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)", re.IGNORECASE)
KEPT = ("license", "license_name", "license_link", "language")
LONGEST, LONGEST_VALUE = 1 << 20, 200  # bytes of a card; characters of a value that is kept of it

logger = logging.getLogger(__name__)


def result_name(name: str) -> str:
    """Return the name of a file in the result: a base's card gets the suffix "-base", because README.md is the
    result's.
    """
    return f"{name.removesuffix('.md')}-base.md" if CARD.fullmatch(name) else name


def documents(folder: Path) -> list[Path]:
    """Return the cards and the licence in a model folder."""
    with reading(folder):
        found = [path for path in sorted(folder.iterdir()) if CARD.fullmatch(path.name) or LICENCE.match(path.name)]
        found = [path for path in found if path.is_file() and path.suffix != ".py"]
    for path in found:
        refuse_foreign(path, folder)
    return found


def said_of_base(folder: Path | None) -> dict[str, Any]:
    """Return licence and language of the base model's card by name on the hub, and the "files" of the result."""
    found = [] if folder is None else documents(folder)
    cards = sorted((path for path in found if CARD.fullmatch(path.name)), key=lambda path: len(path.name))
    metadata = _metadata(cards[0]) if cards else {}
    return metadata | ({"files": [result_name(path.name) for path in found]} if found else {})


def _metadata(card: Path) -> dict[str, Any]:
    """Return the kept values of a card; for an unreadable card none, with a warning."""
    try:
        text = read_text(card, LONGEST)
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text.startswith("---") else {}
    except (OutputError, yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as cause:
        logger.warning("%s cannot be read: the licence is not named in the result's card (%s)", card, shown(str(cause)))
        return {}
    return {name: data[name] for name in KEPT if _is_plain(data.get(name))}


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list) and len(value) <= LONGEST_VALUE else [value]
    return all(isinstance(each, str) and 0 < len(each) <= LONGEST_VALUE for each in values)
