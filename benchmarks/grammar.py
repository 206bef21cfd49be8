"""How plainly docstrings are written: openings that name nothing, and the share of pronouns, by room.

python benchmarks/grammar.py [--openings]
"""

import argparse
import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
VAGUE = frozenset(
    [
        "What",
        "How",
        "Whether",
        "Which",
        "Of",
        "That",
        "Who",
        "Where",
        "It",
        "They",
        "Those",
        "These",
        "This",
        "By",
        "From",
        "For",
        "With",
        "In",
        "On",
        "To",
    ]
)
"""First words that leave the subject open."""
PRONOUNS = frozenset(
    [
        "it",
        "its",
        "itself",
        "they",
        "them",
        "their",
        "theirs",
        "this",
        "these",
        "those",
        "what",
        "which",
        "who",
        "whom",
        "whose",
        "one",
        "ones",
        "each",
        "other",
        "others",
        "another",
        "own",
        "same",
        "found",
    ]
)
"""By this list 1.5 % of the words in httpx's docstrings are pronouns, in lineax 4.8 %, in skglm .9 %."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """The names and docstrings of the definitions in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Definition) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", path.name), text


def words(text: str) -> list[str]:
    """The words of a docstring, without code and formulas."""
    return re.findall(r"[A-Za-z']+", re.sub(r"`[^`]*`|\[[^\]]*\]", " ", text))


def product_files() -> list[Path]:
    """The files of the product; the links `adapters` and `validation` are not followed."""
    places = [ROOT / name for name in ("convexprune", "adapters", "validation")]
    return sorted(path for place in places for path in place.rglob("*.py") if not _behind_link(path))


def _behind_link(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents)


def main() -> None:
    """Print the counts of each room."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openings", action="store_true", help="print the vague openings themselves")
    shown = parser.parse_args().openings
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for path in product_files():
        for name, text in docstrings(path):
            room, spoken = "/".join(path.relative_to(ROOT).parts[:2]), words(text)
            vague = bool(spoken) and spoken[0] in VAGUE
            if vague and shown:
                print(f"{path.relative_to(ROOT)}: {name}: {text.splitlines()[0]}")
            pronouns = sum(word.lower() in PRONOUNS for word in spoken)
            for key in (room, "all"):
                counts[key] = [a + b for a, b in zip(counts[key], (1, vague, len(spoken), pronouns), strict=True)]
    for room, (number, vague, spoken, pronouns) in counts.items():
        print(
            f"{room:32s} {number:5d} docstrings, {vague / number:4.0%} vague, {pronouns / max(1, spoken):5.1%} pronouns"
        )


if __name__ == "__main__":
    main()
