"""How long the sentences of the pages are, in words: tables, code, formulas and headings aside.

python benchmarks/sentences.py [PAGE ...]     (none given: the README and all of docs/)
"""

import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_PROSE = r"^```.*?^```|^\$\$.*?\$\$|<!--.*?-->|^(?: {4}|#|\||!\[).*?$|^::: .*?(?=^$|^:::|\Z)"


def sentences(page: str) -> list[str]:
    """The sentences of a page of Markdown; an item of a list, and what leads to a list, end one."""
    text = re.sub(NO_PROSE, "\n", page, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)  # a link is its words
    text = re.sub(r"`[^`\n]*`|\$[^$\n]*\$", "X", text)  # code and formulas are one word each
    parts = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) |(?<=[.!?])[*_)]*\s+(?=[A-Z(*`\"])|:\n", text)
    return [part for part in parts if re.search(r"\w", part)]


def words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def ninetieth(lengths: list[int]) -> float:
    return statistics.quantiles(lengths, n=10)[-1] if len(lengths) > 1 else lengths[0]


def pages() -> list[Path]:
    """Return the pages that people read; lab/ has the records."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    every = list[int]()
    for page in [Path(name) for name in sys.argv[1:]] or pages():
        if lengths := [words(each) for each in sentences(page.read_text())]:
            every += lengths
            print(
                f"{page.name:18s} {len(lengths):4d} sentences, median {statistics.median(lengths):4.1f}, "
                f"p90 {ninetieth(lengths):4.1f}, longest {max(lengths)}"
            )
    print(f"all: {sum(every):,} words, median {statistics.median(every):.1f}, p90 {ninetieth(every):.1f}")


if __name__ == "__main__":
    main()
