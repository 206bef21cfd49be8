"""The settings of every public function and command."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ByteSize, Field, field_validator, model_validator

from convexprune._schema.group import Settings, setting
from convexprune._schema.parameters import COUNTS, LISTED, RECIPE, TEXTS, Parameters
from convexprune._schema.settings import ALLOW_CHANGED, LARGEST_SEED, Plain, Reading, RemoteCode
from convexprune.errors import OutputError, RecipeError

TASKS = setting((), "Tasks of lm-eval to measure accuracy on, as hellaswag,arc_easy (needs lm-eval).", first=True)
TASKS_DIR = setting(None, "Folder with task files of your own, as lm-eval reads them.", first=True)
TASK_BATCH = 8
EXECUTORS = ("serial", "pool", "ranks", "ray")
TOKENIZER = setting(
    None, "Of a loaded model, to read text: an object of transformers, or its folder or name (in Python)."
)
LIMIT = setting(None, "Only the first so many items of each task, to try it out.", ge=1)


def _needs_tasks(asked: Any) -> Any:
    for name in ("tasks_dir", "limit", "num_fewshot"):
        if getattr(asked, name, None) is not None and not asked.tasks:
            raise RecipeError(f"{name} is of tasks, and no task is named. Name some (--tasks), or leave {name} out.")
    return asked


class Compare(Settings):
    group = "comparison"
    _tasks = model_validator(mode="after")(_needs_tasks)
    methods: Annotated[tuple[str, ...], LISTED] = setting(
        ("fista", "sparsegpt", "wanda", "magnitude"),
        "Methods, or solvers of the method convex; with settings of their own as in sparsegpt:damping=0.1 or "
        "fista:convention=pruned-layer.",
        first=True,
    )
    sparsities: Annotated[tuple[float, ...], LISTED] = setting(
        (0.5,), "Shares of zeros, for unstructured.", "--sparsity", "-s", first=True
    )
    patterns: Annotated[tuple[str, ...], LISTED] = setting(
        ("unstructured",), "unstructured, N:M, columns, channels, heads; as in prune.", "--pattern", first=True
    )
    conventions: Annotated[tuple[str, ...], LISTED] = setting(
        ("own",),
        "Which network feeds a decoder layer, and which of earlier errors are corrected: own, what each method's paper "
        "has, or one for all: dense, dense-half, dense-none, dense-layer, pruned-own, pruned-quarter, pruned-half, "
        "pruned-dense, pruned-layer (docs/compare.md).",
        "--convention",
    )
    allocations: Annotated[tuple[str, ...], LISTED] = setting(
        ("own",),
        "own (what prune takes if it is left out), or one for all: uniform, columns, rows, curve, half-curve, "
        "measured, owl, skewness.",
        "--allocation",
    )
    quota: str = setting(
        "own",
        "Where the share of zeros holds: own (of wanda each row, else the matrix), matrix or row.",
        choices=("own", "matrix", "row"),
    )
    output: Path = setting(Path("compared"), "Folder for the result; must be empty or not there.", "-o", first=True)
    eval_texts: Annotated[tuple[str, ...], TEXTS] = setting(
        ("python-docs", "licences"),
        "Texts to evaluate on: .txt or .jsonl files, python-docs or licences; repeat it for more.",
        "--eval-text",
        first=True,
    )
    tasks: Annotated[tuple[str, ...], LISTED] = TASKS
    tasks_dir: Path | None = TASKS_DIR
    limit: int | None = LIMIT
    eval_window: int | None = setting(None, "Tokens of a window. Left out: 1024, or the model's limit if less.", ge=2)
    eval_windows: int | None = setting(20, "The first so many windows of each text; 0: all.", ge=0)
    resume: bool = setting(False, "Go on with a comparison of the same settings; a finished one is handed back.")
    allow_changed: bool = setting(False, ALLOW_CHANGED)
    plots: bool | None = setting(None, "Draw the results. Left out: if matplotlib is installed.")


class CompareSamples(Compare):
    group = "comparison"
    seeds: Annotated[tuple[int, ...], LISTED] = setting(
        (0,), "Of the choice of samples. Of several (0,1,2) each is compared, and the report has the means.", "--seed"
    )


class Verify(Settings):
    group = "verification"
    model: Annotated[str | None, Plain] = setting(
        None, "Of the folder of a run: where its dense model is now, if it was moved."
    )
    operators: tuple[str, ...] = setting(
        (), "Operators to verify, names or re:REGEX that matches the beginning of some; repeat it for more."
    )
    sample: int | None = setting(3, "Operators drawn if none is named; 0: all.", ge=0)
    rows: int = setting(4, "Rows of the blocks that oracles solve.", ge=1)
    columns: int = setting(32, "Columns of the blocks that oracles solve; the others stay dense.", ge=1)
    bound_rows: int = setting(
        4, "Rows of an operator that the lower bound is for, drawn at random; 64 times as many for whole columns.", ge=1
    )
    tolerance: float = setting(1e-6, "Largest relative difference of objectives.", ge=0)
    gap: float = setting(1e-4, "Largest relative duality gap of a production solver at its default settings.", ge=0)
    allow_changed: bool = setting(False, ALLOW_CHANGED)
    seed: int = setting(0, "Of what is drawn.", ge=0, le=LARGEST_SEED)


class Evaluate(Reading):
    group = "data"
    _tasks = model_validator(mode="after")(_needs_tasks)
    text: Annotated[tuple[str, ...], TEXTS] = setting(
        (),
        "Texts to measure perplexity on: .txt or .jsonl files; wikitext2, c4, ptb (from the hub); python-docs, "
        "licences (of this installation); repeat it for more.",
        first=True,
    )
    against: Any = setting(
        None,
        "The dense model, a folder or a name on the hub: how far the predictions are from its own is measured, too.",
        first=True,
        named=True,
    )
    tokenizer: Any = TOKENIZER
    tasks: Annotated[tuple[str, ...], LISTED] = TASKS
    tasks_dir: Path | None = TASKS_DIR
    window: int | None = setting(
        None,
        "Tokens of a window; they do not overlap. Left out: the common convention, 2048 or the model's limit if less, "
        "and beside it the model's limit.",
        ge=2,
    )
    max_windows: int | None = setting(
        None, "Only the first so many windows of each text. Left out: all; of c4 256, as published.", ge=1
    )
    num_fewshot: int | None = setting(None, "Examples before each item of a task. Left out: as the task has it.", ge=0)
    limit: int | None = LIMIT
    task_batch: int = setting(TASK_BATCH, "Items of a task in one forward pass.", "--batch-size", ge=1)


class Bench(Reading):
    group = "timing"
    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], COUNTS] = setting(
        (1, 8, 64), "Sequences that are generated at once, as 1,8,64.", "--batch", min_length=1
    )
    prompt: int = setting(512, "Tokens of a prompt; fewer if the model cannot see as many.", ge=1)
    new_tokens: int = setting(
        8, "Tokens to generate in each round; fewer of what takes long, or if the model cannot see as many.", ge=1
    )
    seconds: float = setting(
        15.0,
        "Seconds to share out among what is timed; less than a round takes is a round. More make it less noisy.",
        gt=0,
        le=86_400,  # a day
    )


MEASURED_ON = "SmolLM2-135M, a 4-bit file (which flatters int4)"
"""The model of the table that `advise` reads."""


class Advise(RemoteCode):
    group = "target"
    target: ByteSize | None = setting(None, "All weights in so many bytes, as 4GiB, on disk.", first=True)
    memory: bool = setting(False, "Of the target: in memory, not on disk.", first=True)
    bits: float | None = setting(None, "So many bits a weight on disk, over all weights.", gt=0, first=True)
    speed: float | None = setting(
        None,
        "So many times the tokens a second at batch 1, where the bytes that are read decide it.",
        gt=1,
        first=True,
    )


Kind = Literal["kernels", "answers", "determinism", "runs"]
CHECKS: tuple[str, ...] = get_args(Kind)


class Doctor(Settings):
    group = "device"
    checks: Annotated[tuple[Kind, ...], LISTED] = setting((), f"Which checks: {', '.join(CHECKS)}. Left out: all.")


class Opening(Reading):
    group = "model"
    allow_pickle: bool = setting(False, "Read pickled checkpoints, which can run code.")
    tokenizer: Any = TOKENIZER


class Output(Settings):
    group = "run"
    output_dir: Path | None = setting(
        None,
        "Folder for the result; must be empty or not there. In Python it may be left out: the result is in memory.",
        "--output",
        "--save-model",
        "-o",
        first=True,
    )

    @field_validator("output_dir", mode="before")
    @classmethod
    def _named(cls, folder: Any) -> Any:
        if isinstance(folder, str) and not folder.strip():
            raise OutputError("output_dir is an empty text. Give a folder, or leave it out.")
        return folder


class Progress(Settings):
    group = "run"
    on_progress: Callable[[Any], Any] | None = setting(
        None, "Takes a `convexprune.Event` as a phase begins and as a step is done."
    )


class Call(Progress, Output, Opening):
    group = "run"
    resume: bool = setting(
        False,
        "Go on with the unfinished run in the output folder, if there is one; a finished one is handed back.",
        first=True,
    )
    overwrite: bool = setting(
        False,
        "Replace the run that is in the output folder: it stays until the new one is whole. A folder that holds "
        "anything else is refused.",
    )
    report_dir: Path | None = setting(
        None, "Folder for a copy of report.json and recipe.yaml, which lie beside the result too.", "--save"
    )
    pack: bool = setting(
        False,
        "Make the result a pack, smaller to store and to download; convexprune unpack makes an ordinary folder of it.",
    )
    push_to_hub: str | None = setting(
        None,
        "Upload the finished result to the Hugging Face hub, with its model card: OWNER/NAME. If that fails, the "
        "result stays, and --resume uploads it.",
    )
    private: bool | None = setting(
        None,
        "Of push_to_hub: a new repository is private. Left out: as its owner has chosen, mostly public.",
    )
    executor: str = setting(
        "serial",
        "Who prunes: serial, this process; pool, processes on this machine, one for each GPU; ranks, of torchrun or "
        "SLURM, all started with this same call; ray (needs Ray). All but serial need an output folder that all of "
        "them see, and a model that can be opened there. With the prefix pruned layers wait for each other: ranks then "
        "share out the samples of each layer.",
        choices=EXECUTORS,
    )
    workers: int | None = setting(
        None,
        "Processes of pool, tasks of ray. Left out: one for each GPU, or as many as the cores have room for.",
        ge=1,
    )

    @model_validator(mode="after")
    def _has_folder(self) -> "Call":
        does = {"resume": "goes on with a run", "overwrite": "replaces the run", "pack": "packs the result"}
        for name, what in does.items():
            if getattr(self, name) and self.output_dir is None:
                raise RecipeError(f"{name}=True {what} in a folder. Give output_dir, or leave {name} out.")
        if self.push_to_hub is not None and self.output_dir is None:
            raise RecipeError(
                "push_to_hub uploads a folder, which stays if that fails. Give output_dir, or call push_to_hub of the "
                "result."
            )
        if self.private is not None and self.push_to_hub is None:
            raise RecipeError("private is of push_to_hub. Give the name of a repository, or leave private out.")
        return self


class Permute(Progress, Output, Opening):
    group = "target"
    pattern: str = setting("2:4", "N:M for N non-zeros in every M inputs, which is to prune less.")


class Inspect(RemoteCode):
    group = "device"
    device_memory: ByteSize | None = setting(None, "What has to be enough, as 24GiB; or a number of bytes.")


SAMPLED = ("model", "dtype", "dataset", "num_calibration_samples", "max_seq_length", "batch_size", "seed", "device")
COMPARED = (*SAMPLED, "held_out_samples", "targets", "ignore")
NOT_VERIFIED = ("held_out_samples", "evaluation", "threads", "rules", "model", "seed", "bound_rows")  # or its own
VERIFIED = tuple(name for name in RECIPE if name not in NOT_VERIFIED)

PRUNE = Parameters(Call, tuple(RECIPE))
PERMUTE = Parameters(Permute, SAMPLED, {"num_calibration_samples": 16})
COMPARE = Parameters(Compare, COMPARED, {"num_calibration_samples": 64, "dtype": "float32"})
COMPARE_SAMPLES = Parameters(CompareSamples, tuple(name for name in COMPARED if name != "seed"), COMPARE.defaults)
INSPECT = Parameters(Inspect, tuple(RECIPE))
VERIFY = Parameters(Verify, VERIFIED)
EVALUATE = Parameters(Evaluate, ("model", "dtype", "device"))
BENCH = Parameters(Bench, ("model", "device"))
ADVISE = Parameters(Advise, ("model",))
DOCTOR = Parameters(Doctor, ("device",))
