"""From a recipe to pruned decoder layers; knows no architecture and no file format."""

from convexprune.pipeline.layer import HiddenStates, LayerSettings, observe, prune_layer, prune_observed, stage_folds
from convexprune.pipeline.output import check_output, whole_folder
from convexprune.pipeline.recipe import PRESETS, Recipe, make_recipe
from convexprune.pipeline.run import check_patterns, prune_layers

__all__ = [
    "PRESETS",
    "HiddenStates",
    "LayerSettings",
    "Recipe",
    "check_output",
    "check_patterns",
    "make_recipe",
    "observe",
    "prune_layer",
    "prune_layers",
    "prune_observed",
    "stage_folds",
    "whole_folder",
]
