"""What `inspect` makes of every decoder that transformers knows: its operators, or why the model is refused.

    python benchmarks/families.py [--only TYPE ...] > families.md

Each model is described by the configuration that transformers has for its type, as large as that says. No weights are
read or made. A line is printed when it is there; at the end, how many of them are pruned.
"""

import argparse
import multiprocessing
import tempfile
from collections import Counter
from pathlib import Path
from traceback import extract_tb

import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import convexprune
from convexprune.errors import ConvexpruneError

SECONDS = 300  # of one type


def answer(kind: str) -> tuple[str, str]:
    """One type of model: whether it is pruned, and what a line of the table says."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            AutoConfig.for_model(kind).save_pretrained(folder)
            found = convexprune.inspect(f"{folder}/config.json")
        except Exception as error:  # what is not ours stands in the table, with the file that raised it
            said = " ".join(str(error).replace(f"{folder}/config.json", kind).replace("|", "/").split())
            if not isinstance(error, ConvexpruneError):
                place = Path(extract_tb(error.__traceback__)[-1].filename)
                return "failed", f"{type(error).__name__} in {'/'.join(place.parts[-3:])}: {said} | "
            return "not built by transformers" if "cannot be read" in said else "refused", f"{said} | "
    left = Counter(found.left_alone.values())
    reasons = "; ".join(f"{count} {reason}" for reason, count in left.items())
    return "pruned", f"{found.operators:,} operators, {found.weights / 1e9:.2f} billion weights | {reasons}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    args = parser.parse_args()
    print(
        f"transformers {transformers.__version__}\n\n| type | | | left alone |\n| --- | --- | --- | --- |", flush=True
    )
    verdicts = Counter[str]()
    for kind in args.only:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            try:
                verdict, said = pool.apply_async(answer, (kind,)).get(SECONDS)
            except multiprocessing.TimeoutError:
                verdict, said = "no answer", f"in {SECONDS} s | "
        verdicts[verdict] += 1
        print(f"| {kind} | {verdict} | {said} |", flush=True)
    print(f"\n{', '.join(f'{count} {verdict}' for verdict, count in verdicts.most_common())}")


if __name__ == "__main__":
    main()
