"""Recipes: what to do, as data. A recipe is a YAML file or a dict; an unknown key is an error that names the nearest known one."""

from moebit.recipe.allocation import AllocationSection, SwitchingSection
from moebit.recipe.calibration import CalibrationSection
from moebit.recipe.inputs import ACTIVATION_WIDTHS, ActivationsSection, RotationSection
from moebit.recipe.loading import load_recipe, parse_override, presets
from moebit.recipe.recipe import Recipe
from moebit.recipe.refine import RefineSection
from moebit.recipe.router import RouterSection
from moebit.recipe.section import BIT_WIDTHS
from moebit.recipe.smoothing import SmoothingSection
from moebit.recipe.solver import SolverSection
from moebit.recipe.weights import GROUP_SIZES, WeightsSection

__all__ = [
    "ACTIVATION_WIDTHS",
    "BIT_WIDTHS",
    "GROUP_SIZES",
    "ActivationsSection",
    "AllocationSection",
    "CalibrationSection",
    "Recipe",
    "RefineSection",
    "RotationSection",
    "RouterSection",
    "SmoothingSection",
    "SolverSection",
    "SwitchingSection",
    "WeightsSection",
    "load_recipe",
    "parse_override",
    "presets",
]
