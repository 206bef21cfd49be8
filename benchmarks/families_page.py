"""Print lab/families.md from what the tests of the adapters recorded, one JUnit file for each release of transformers."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

Record = dict[str, str]

HEAD = """# Families: what was tested, and what is refused

The families in the list were tested on the releases of transformers beside them. Others need no code of their own: try
`convexprune inspect MODEL`. A model works if its decoder layers, called one by one, are the model. Otherwise it is
[refused](#what-is-refused), with a message. Layers, operators, shared
inputs, order, experts and routers are found by watching a few forward passes (`adapters/_discovery/discovery.py`).
`inspect` finds them in 143 of 196 types of models. [The others](benchmarks.md#every-decoder-of-transformers) have their reasons.

Each family here is a tiny random model, built from its configuration in `tests/tiny_families.py`. It is saved, pruned from that folder by
Wanda, saved, and loaded by plain transformers. At 50 % rows are weighed by gradients. Tests then check, bit for bit:

- The zeros of the loaded weights are exactly as many as asked for.
- The logits are those of the pruned model.
- Every weight that is no operator is the dense one.
- The tensors on disk have the names, shapes and types of the dense checkpoint, and at sparsity 0 its bits.

*Replay error* compares decoder layers called one by one with the model's own forward pass. It is relative, on other tokens than those that
the calls were recorded with. Real models are pruned in [benchmarks.md](benchmarks.md). `.ci/matrix` writes this page from its test run.
"""

EXPERTS = """
## Experts

- An expert's operators are pruned on the tokens that are routed to it. What routes is never pruned.
- Experts that transformers 5 keeps in one 3-D parameter are pruned one by one. Gate and up are then one operator, as Phi-3's are. They are
  saved in the checkpoint's own form.
- Experts that the model multiplies all at once with all tokens, as Llama 4's, are looped over, each with its own tokens.
- An expert that was sent fewer tokens than it has inputs borrows. The mean moments of all experts' inputs of its stage are added, with the
  weight of the tokens that are lacking. Its `facts` in the report say how many (`borrowed_tokens`). `short_of_tokens` lists all such
  experts. Their errors are those on the mixture.
- Errors of experts are not corrected for (`error_correction`): the dense and the pruned network may send a token to different experts.
"""

OTHER = """
## Other ways in

| what | what happens |
| --- | --- |
| safetensors, sharded or not; float32, bfloat16, float16 | as they are |
| GGUF | its blocks are unpacked, with a warning; what is saved is an ordinary folder |
| offloaded by accelerate (`device_map`, `cpu_offload`) | pruned where accelerate keeps the weights, and read back to verify; a file of its own or of the checkpoint is never written to, so what is offloaded to disk is in memory once pruned |
| text decoder inside a vision-language model | pruned; all around it is left alone and listed in the report |
"""


def main(paths: list[Path]) -> None:
    records = [record for path in paths for record in read(path)]
    versions = sorted({r["transformers"] for r in records if "family" in r}, key=as_numbers)
    print(HEAD)
    print("| family | transformers | operators | weights | zeros at 50 % | zeros at 2:4 | replay error |")
    print("| --- | --- | --: | --: | --: | --: | --: |")
    found = {(r["family"], r["transformers"], r["pattern"]): r for r in records if "family" in r}
    families = list(dict.fromkeys(family for family, _, _ in found))
    for family in families:
        for version in versions:
            half, semi = (found[family, version, pattern] for pattern in ("50 %", "2:4"))
            counts = " | ".join(
                f"{int(n):,}" for n in (half["operators"], half["weights"], half["zeros"], semi["zeros"])
            )
            print(f"| {family} | {version} | {counts} | {max(float(r['replay error']) for r in (half, semi)):g} |")
    print(
        f"\n## Stages\n\nAs found on transformers {versions[-1]}, in the last layer; of experts, the first one. An arrow leads to the next "
        "stage, a semicolon to the next input of the same stage. What stands together shares its input. Lines are those of the "
        "configuration, beside what families have in common.\n"
    )
    print("| family | stages | lines |\n| --- | --- | --: |")
    lines = lines_of_configuration()
    for family in families:
        print(f"| {family} | {found[family, versions[-1], '2:4']['stages']} | {lines[family]} |")
    print(EXPERTS + OTHER)
    print("## What is refused\n\n| what | message |\n| --- | --- |")
    refused = {r["refused"]: r["message"] for r in records if "refused" in r and r["transformers"] == versions[-1]}
    for what, message in refused.items():
        print(f"| {what} | {cell(message)} |")


def lines_of_configuration() -> dict[str, int]:
    """How many lines each family takes in the table of tests/tiny_families.py."""
    tree = ast.parse((Path(__file__).parent.parent / "tests" / "tiny_families.py").read_text())
    table = next(n.value for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "FAMILIES")
    assert isinstance(table, ast.Dict)
    pairs = zip(table.keys, table.values, strict=True)
    return {ast.literal_eval(key): (value.end_lineno or 0) - key.lineno + 1 for key, value in pairs if key}


def read(path: Path) -> Iterator[Record]:
    """What the tests of one run recorded.

    Raises:
        SystemExit: a test of the run failed.
    """
    root = ElementTree.parse(path).getroot()
    if any(True for tag in ("failure", "error") for _ in root.iter(tag)):
        sys.exit(f"{path}: a test failed; the page would not be true.")
    for case in root.iter("testcase"):
        record = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        if record:
            yield record


def as_numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def cell(message: str) -> str:
    """One line, without the folders of the machine that it was made on."""
    return re.sub(r"(?<![\w:/])/(?:[\w.<>-]+/)+", "", message).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
