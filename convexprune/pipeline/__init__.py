"""From a recipe to pruned decoder layers; knows no architecture and no file format."""

from convexprune.pipeline.layer import LayerSettings, prune_layer
from convexprune.pipeline.output import check_output, whole_folder
from convexprune.pipeline.recipe import PRESETS, Recipe, make_recipe
from convexprune.pipeline.run import check_patterns, prune_layers

__all__ = [
    "PRESETS",
    "LayerSettings",
    "Recipe",
    "check_output",
    "check_patterns",
    "make_recipe",
    "prune_layer",
    "prune_layers",
    "whole_folder",
]
