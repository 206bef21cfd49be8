"""All settings of a run, in groups: name, type, default and help.

The recipe (`convexprune.recipe`), the options of the command line, the arguments of functions and their descriptions
(`_schema.functions`) are made from these groups. No import of torch here: help is quick.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, field_validator, model_validator

from convexprune._schema.group import Settings, from_yaml, setting
from convexprune.errors import RecipeError, shown

BUNDLED = "opt-books"  # the small OPT model that comes with convexprune, unless there is a folder of that name
LARGEST_SEED = 2**63 - 1  # torch's generators take no more
ONE_OF = "a sparsity, a pattern or a method"


def _plain(value: Any) -> Any:
    """Return the name of a dtype, a device or a path; any other value is returned unchanged."""
    is_named = isinstance(value, Path) or type(value).__name__ in ("dtype", "device")  # of torch, which is not imported
    return str(value).removeprefix("torch.") if is_named else value


Plain = BeforeValidator(_plain)
# A setting that may be a single name.
Names = Annotated[tuple[str, ...], BeforeValidator(lambda names: [names] if isinstance(names, str) else names)]
Arguments = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else from_yaml(value))]


class ModelSettings(Settings):
    group = "model"
    model: str = setting(BUNDLED, "Folder, or name on the hub. Left out: the small OPT model that is bundled.")
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, Plain] = setting(
        None, "float32, bfloat16 or float16. Left out: as the checkpoint is stored; the bundled model in float32."
    )


class DataSettings(Settings):
    group = "data"
    dataset: str = setting(
        "self",
        "Text to calibrate on: self (sampled from the model), c4, wikitext2, ptb, OWNER/NAME on the hub (needs the "
        "package datasets), or a .txt or .jsonl file; or several with shares, as a.txt:0.5,self:0.5.",
        first=True,
    )
    num_calibration_samples: int = setting(128, "Samples to fit on.", "--nsamples", ge=1, first=True)
    held_out_samples: int | None = setting(
        None,
        "More samples, on which errors are measured and nothing is fitted. Left out: an eighth as many, or what the "
        "data set has left.",
        ge=0,
    )
    max_seq_length: int | None = setting(
        None,
        "Tokens of a sample. Left out: 2048, or the model's limit if less; 256 for the bundled model. Token ids "
        "keep their own length.",
        "--seqlen",
        ge=2,
        first=True,
    )
    batch_size: int = setting(1, "Samples in one forward pass.", ge=1)
    seed: int = setting(0, "Decides which samples are drawn, and what a model writes.", ge=0, le=LARGEST_SEED)


class Rule(Settings):
    """Settings of selected operators. The recipe has the defaults."""

    targets: Names = Field(min_length=1)
    sparsity: float | None = None
    pattern: str | None = None
    method: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Rule":
        if self.sparsity is self.pattern is self.method is None:
            raise RecipeError(f"The rule for {', '.join(self.targets)} changes nothing. Give {ONE_OF}.")
        return self


class TargetSettings(Settings):
    group = "target"
    sparsity: float | None = setting(
        None,
        "Share of zeros, in [0, 1). Left out: 0.5, or as N:M fixes; 0 with target, quantize gguf, compressed-tensors.",
        "--sparsity-ratio",
        "-s",
        first=True,
    )
    pattern: str = setting(
        "unstructured",
        "unstructured; N:M, N non-zeros in every M inputs, as 2:4; columns, inputs that are zero in all rows, or "
        "columns:64, in blocks of so many. Removed for good, in all layers alike: channels of the MLP, so that a "
        "multiple of 64 is left, or of another number (channels:256); heads, each KV head with its query heads; "
        "layers; experts of a mixture (docs/deploy.md).",
        "--sparsity-type",
        first=True,
    )
    quota: Literal["matrix", "row"] = setting(
        "matrix", "Where the share of zeros holds: in each matrix, or in each row of it."
    )
    quantize: str | None = setting(
        None,
        "What is kept becomes numbers of few bits, times a scale for each group of weights; zeros stay zero. Whole "
        "numbers: int8 to int3. Tables: nf4, fp4, mxfp4. GGUF: q8_0, q6_k, q5_k, q5_0, q4_k, q4_0, iq4_nl, iq4_xs, "
        "q3_k, q2_k. The best for each operator and the head, within target or bits: gguf, of these, embedding "
        "too; compressed-tensors, of int8 and int4. With a sparsity of 0: quantization alone. Left out: none.",
    )
    embedding: str | None = setting(
        None,
        "Grid of embedding and head, which count once if tied: int8 to int3, or a block of GGUF files; judged by what "
        "they do to the logits. With a size they are chosen. Left out: they stay as they are.",
    )
    target: ByteSize | None = setting(
        None,
        "With quantize gguf (the default with target): bytes of the whole GGUF file, as 900MB or 1.5GiB; it has so "
        "many or few less. With compressed-tensors: of the exported weights.",
    )
    bits: float | None = setting(
        None,
        "In place of quantize: so many bits a weight, 1 to 6, in the packed model. Weights are whole numbers times a "
        "scale for each column, as fine as their entropy code allows. With quantize gguf or compressed-tensors: bits "
        "a weight of the whole file, up to 16. Left out: none.",
        ge=1,
        le=16,
    )
    group_size: int = setting(
        64, "Columns of a row that share a scale of quantize: 32, 64 or 128; -1: all. Blocks of GGUF have their own."
    )
    allocation: str = setting(
        None,
        "How the zeros, or the bits, are spread. uniform: the same share in each operator. rows: that too, but its "
        "rows compete for it by how much they move the loss. columns: so do whole columns. curve: shares of least "
        "predicted loss, after a survey of the dense model; half-curve, half of the way; measured, for N:M, "
        "bits and types, with costs corrected by the divergence of the pruned model. owl, skewness: by the scores of "
        "each decoder layer. N:M takes uniform, curve, measured. Left out: for convex and admm rows if unstructured, "
        "quota matrix; columns for channels; curve for bits and target; else uniform.",
        choices=("uniform", "columns", "rows", "curve", "half-curve", "measured", "owl", "skewness"),
    )
    targets: tuple[str, ...] = setting(
        ("Linear",), "Operators to prune: a name or its last parts, re:REGEX, Linear for all; repeat for more."
    )
    ignore: tuple[str, ...] = setting((), "Operators to leave alone, named the same way; repeat it for more.")
    rules: tuple[Rule, ...] = setting(
        (),
        "What some operators have of their own, each rule as {targets: [NAME, re:REGEX, ...], sparsity: S, pattern: P, "
        "method: M}, with one of the three or more. The first rule that matches an operator counts. A sparsity of 0 "
        "leaves operators dense. Repeat it for more.",
        "--rule",
    )

    @field_validator("rules", mode="before")
    @classmethod
    def _read_rules(cls, rules: Any) -> Any:
        if not isinstance(rules, list | tuple):
            raise RecipeError(f"rules={shown(rules)} is no list. Write [{{targets: [...], sparsity: 0.3}}, ...].")
        return [from_yaml(rule) for rule in rules]

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _listed(cls, names: Any) -> Any:
        if isinstance(names, str):
            raise RecipeError(f"Targets and ignore are lists of names; got the text {names!r}. Write [{names!r}].")
        return names


METHODS = ("convex", "admm", "alps", "fistapruner", "magnitude", "sparsegpt", "wanda", "osscar", "reap", "shortgpt",
           "wanda-sp")  # fmt: skip


class MethodSettings(Settings):
    group = "method"
    method: str = setting(
        "convex",
        "convex, ours; admm, the pattern as a constraint. Baselines: alps, fistapruner, magnitude, sparsegpt, wanda; "
        "for columns and channels osscar, wanda-sp (heads, too); for layers shortgpt; for experts reap.",
        "--prune-method",
        choices=METHODS,
        first=True,
    )
    solver: str = setting(
        "fista",
        "Solver of the method convex: fista, admm; sklearn (needs scikit-learn); for very small models cvxpy, scipy "
        "(minutes each).",
        choices=("fista", "admm", "cvxpy", "scipy", "sklearn"),
    )
    preset: str | None = setting(
        None,
        "Settings for an intention, where others are left out. best: prefix pruned for unstructured, N:M and quantize, "
        "allocation half-curve for unstructured, token_weights loss for quantize. balanced: the defaults. fast: 32 "
        "samples, no bounds; sparsegpt for unstructured and N:M, no beam for quantize. fistapruner: arXiv 2408.03728.",
        choices=("best", "balanced", "fast", "fistapruner"),
        first=True,
    )
    damping: float | None = setting(
        None,
        "Of convex, admm and a refit that is added: pull to the dense weight, relative to the diagonal of the Gram "
        "matrix. Left out: from the noise of the sample. Other methods have theirs in method_args.",
        ge=0,
    )
    refit: bool | None = setting(None, "Least squares for the weights that are kept. Left out: as the method has it.")
    error_correction: Annotated[float, BeforeValidator(lambda v: float(v) if isinstance(v, bool) else v)] = setting(
        None,
        "How much an operator makes up for the errors of those pruned before it, 0 to 1. Left out: 1, or 1/2 with the "
        "prefix pruned; as published for gptaq, 0.25, and qep, 0.5.",
        ge=0,
        le=1,
    )
    error_target: Literal["operator", "residual_stream"] = setting(
        None,
        "Which error to make up for: operator, that of the operator's own outputs, as published; residual_stream, for "
        "the operator that ends a decoder layer that of the layer's outputs. Left out: residual_stream; for "
        "fistapruner, gptaq and qep operator.",
    )
    prefix: Literal["dense", "pruned"] = setting(
        None,
        "The network that feeds a decoder layer: the dense one, so that layers are independent, or the one pruned so "
        "far. Left out: dense; where layers or experts are removed, and for gptaq and qep, pruned.",
    )
    token_weights: str = setting(
        None,
        "How calibration tokens count: none, all alike; attention_sink, a tenth of all weight (half as "
        "attention_sink:0.5) for the first four of each sample, where outputs are keys and values; loss, half by "
        "squared gradients. Left out: attention_sink with quantize and our quantizer, else none.",
    )
    refine: str = setting(
        "none",
        "After pruning, move the kept values of a decoder layer, or the scales of quantize, to lower the error of its "
        "outputs: none; layer, all at once; half-layer, those of attention first. In two ways: layer:adam and "
        "layer:gauss-newton. Held-out samples decide whether values move.",
    )
    quantizer: Literal["descent", "gptaq", "gptq", "qep", "rtn"] = setting(
        "descent",
        "What finds the codes of quantize: descent, ours; or a baseline: gptq (with prefix pruned and error_correction "
        "0 as published), gptaq, qep, rtn (round to nearest).",
    )
    quantizer_args: Arguments = setting({}, "Settings of the quantizer's class: {name: value}.")
    method_args: Arguments = setting({}, "Settings of the method's class: {name: value}.")


class RunSettings(Settings):
    group = "run"
    bound_rows: int = setting(
        2,
        "Rows of each operator (all, if it has fewer) whose error the report compares with a certified lower bound on "
        "that of any pruning (docs/certificates.md); 64 times as many for whole columns; 0: none.",
        ge=0,
    )
    evaluation: str | None = setting(
        None,
        "Text to measure perplexity on, before and after, and the KL divergence from the dense model: held-out (the "
        "held-out samples), self (sampled from the dense model, apart from the calibration samples), or a .txt or "
        ".jsonl file. Left out: none; on the command line self, if the dataset is.",
        first=True,
    )


class DeviceSettings(Settings):
    group = "device"
    device: Annotated[str, Plain] = setting(
        "auto", "auto (the GPU if there is one), cpu, cuda, cuda:1, ...", first=True
    )
    gram_precision: Literal["auto", "float32", "tf32", "bf16x3"] = setting(
        "auto",
        "How second moments are multiplied: float32; tf32; bf16x3, three products of bfloat16; auto, float32 on a CPU, "
        "bf16x3 on a GPU, where inputs in 16 bits are multiplied exactly. A CPU emulates the coarse ones.",
    )
    solve_precision: Literal["auto", "float32", "tf32", "bf16x3"] = setting(
        "auto", "How solves multiply, likewise. Certificates and errors are never coarser than float32."
    )
    certificate_precision: Literal["auto", "float64", "parts"] = setting(
        "auto",
        "How certificates multiply: float64; parts, exact products of parts of six bits, with a bound on what they "
        "leave out; auto, parts on a GPU whose float64 is slow (RTX 4090, L40S), else float64.",
    )
    threads: int | None = setting(
        None,
        "Threads that a layer is pruned on; the last bits depend on it. Left out: those of torch, divided by the "
        "workers.",
        ge=1,
    )


GROUPS = (ModelSettings, DataSettings, TargetSettings, MethodSettings, RunSettings, DeviceSettings)


class RemoteCode(Settings):
    """Trust in remote code. A recipe does not grant trust: recipes are passed on."""

    group = "model"
    trust_remote_code: bool = setting(False, "Let transformers run code that the checkpoint brings.")


ALLOW_CHANGED = "Take a result whose files are not those that its run wrote."


class Reading(RemoteCode):
    group = "model"
    allow_changed: bool = setting(False, ALLOW_CHANGED)
