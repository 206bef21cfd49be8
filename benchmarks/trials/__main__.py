"""Everything that was once tried on convexprune, tried again, with the old and the new answer.

python benchmarks/trials                                  all rows but the slow ones, a table on the terminal
python benchmarks/trials --only 'dev_|seed' --list commands
python benchmarks/trials --slow --markdown lab/trials.md --json answers.json
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # a machine without a hub; transformers looks at these as it is imported
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_ENDPOINT": "http://127.0.0.1:9"}

from pages import markdown, totals
from runner import answer, hide
from tables import Result, all_rows, before
from workshop import supply


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", help="only this list: commands, calls, mathematics, reliability")
    parser.add_argument("--only", default="", metavar="REGEX", help="only rows whose name it is found in")
    parser.add_argument("--slow", action="store_true", help="the rows, too, that kill processes or take minutes")
    parser.add_argument("--patience", type=float, default=1.0, help="times the seconds that rows have")
    parser.add_argument("--markdown", type=Path, help="write a page")
    parser.add_argument("--json", type=Path, help="write the answers")
    args = parser.parse_args(arguments)
    rows = [r for r in all_rows() if args.list in (None, r.list) and re.search(args.only, r.name)]
    old, results = before(), []
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as workshop:
        os.chdir(workshop)
        try:
            for row in rows:
                if row.slow and not args.slow:
                    continue
                supply(row.text)
                new = answer(row, args.patience)
                results.append(Result.of(row, new))
                print(results[-1].line(old), flush=True)
        finally:
            os.chdir(home)
    print(totals(results, old))
    if args.json:
        args.json.write_text("[\n" + ",\n".join(json.dumps(r._asdict()) for r in results) + "\n]\n")
    if args.markdown:
        args.markdown.write_text(markdown(results, old, rows))
    return 0 if all(result.right for result in results) else 1


if __name__ == "__main__":
    hide("datasets", "ray")
    sys.exit(main(sys.argv[1:]))
