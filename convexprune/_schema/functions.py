"""The settings of every public function and command."""

from pathlib import Path
from typing import Any

from pydantic import ByteSize, field_validator, model_validator

from convexprune._schema.door import RECIPE, Door
from convexprune._schema.group import Settings, setting
from convexprune._schema.measures import Advise, Bench, Compare, CompareSamples, Doctor, Evaluate, Verify
from convexprune._schema.settings import Reading, RemoteCode
from convexprune.errors import OutputError, RecipeError


class Opening(Reading):
    group = "model"
    allow_pickle: bool = setting(False, "Read pickled checkpoints, which can run code.")
    tokenizer: Any = setting(
        None, "For a loaded model and a data set of text: an object of transformers, or its folder or name."
    )


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
    on_progress: Any = setting(None, "Takes a `convexprune.Event` as a phase begins and as a step is done.")

    @field_validator("on_progress")
    @classmethod
    def _callable(cls, on_progress: Any) -> Any:
        if on_progress is not None and not callable(on_progress):
            kind = type(on_progress).__name__
            raise RecipeError(f"on_progress is a {kind}. Accepted: a function that takes a convexprune.Event.")
        return on_progress


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
        "Of push_to_hub: whether a new repository is private. Left out: as its owner has chosen, on the hub mostly "
        "public.",
    )
    executor: str = setting(
        "serial",
        "Who prunes: serial, this process; pool, processes on this machine, one for each GPU; ranks, of torchrun or "
        "SLURM, all started with this same call; ray (needs Ray). All but serial need an output folder that all of "
        "them see, and a model that can be opened there. With the prefix pruned layers wait for each other: ranks then "
        "share out the samples of each layer.",
        choices=("serial", "pool", "ranks", "ray"),
    )
    workers: int | None = setting(
        None,
        "Processes of pool, tasks of ray. Left out: one for each GPU, or as many as the cores have room for.",
        ge=1,
    )

    @model_validator(mode="after")
    def _has_folder(self) -> "Call":
        if self.resume and self.output_dir is None:
            raise RecipeError("resume=True goes on with a run in a folder. Give output_dir, or leave resume out.")
        if self.overwrite and self.output_dir is None:
            raise RecipeError("overwrite=True replaces the run in a folder. Give output_dir, or leave overwrite out.")
        if self.pack and self.output_dir is None:
            raise RecipeError("pack=True packs the result in a folder. Give output_dir, or leave pack out.")
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
OF_VERIFY = ("model", "seed", "bound_rows")  # it has its own
UNUSED = ("held_out_samples", "evaluation", "threads", "rules")  # what a run does besides, or how
VERIFIED = tuple(name for name in RECIPE if name not in (*OF_VERIFY, *UNUSED))

PRUNE = Door(Call, tuple(RECIPE))
PERMUTE = Door(Permute, SAMPLED, {"num_calibration_samples": 16})
COMPARE = Door(Compare, COMPARED, {"num_calibration_samples": 64, "dtype": "float32"})
COMPARE_SAMPLES = Door(CompareSamples, tuple(name for name in COMPARED if name != "seed"), COMPARE.defaults)
INSPECT = Door(Inspect, tuple(RECIPE))
VERIFY = Door(Verify, VERIFIED)
EVALUATE = Door(Evaluate, ("model", "dtype", "device"))
BENCH = Door(Bench, ("model", "device"))
ADVISE = Door(Advise, ("model",))
DOCTOR = Door(Doctor, ("device",))
