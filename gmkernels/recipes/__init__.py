"""What `python -m gmkernels train` can train: each module here adds the recipes of a paradigm."""

import importlib
import pkgutil

from gmkernels.recipes.recipe import (
    FLAGS,
    Recipe,
    option_defaults,
    parse_options,
    sample_options,
)

__all__ = ["FLAGS", "RECIPES", "Recipe", "option_defaults", "parse_options", "sample_options"]

_MODULES = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "recipe")
RECIPES: dict[str, Recipe] = {}
for _name in _MODULES:
    RECIPES |= importlib.import_module(f"{__name__}.{_name}").RECIPES
