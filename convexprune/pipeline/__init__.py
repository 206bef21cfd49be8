"""From a recipe to pruned decoder layers; knows no architecture and no file format of models."""

from convexprune.pipeline.executors import AbstractExecutor, make_executor
from convexprune.pipeline.layer import prune_observed, stage_folds
from convexprune.pipeline.machine import threads
from convexprune.pipeline.output import RunFolder, check_output
from convexprune.pipeline.passes import observe, stage_inputs, through
from convexprune.pipeline.run import check_patterns, checksum, identity, prune_in_folder, prune_in_place
from convexprune.pipeline.settings import HiddenStates, LayerSettings
from convexprune.pipeline.store import FolderStore, MemoryStore
from convexprune.pipeline.task import Work
from convexprune.pipeline.walk import LayerCalls, LayerContext, LayerWalk, propagate
from convexprune.pipeline.worker import Job

__all__ = [
    "AbstractExecutor",
    "FolderStore",
    "HiddenStates",
    "Job",
    "LayerCalls",
    "LayerContext",
    "LayerSettings",
    "LayerWalk",
    "MemoryStore",
    "RunFolder",
    "Work",
    "check_output",
    "check_patterns",
    "checksum",
    "identity",
    "make_executor",
    "observe",
    "propagate",
    "prune_in_folder",
    "prune_in_place",
    "prune_observed",
    "stage_folds",
    "stage_inputs",
    "threads",
    "through",
]
