"""The recipes that there are, and their settings in words."""

from __future__ import annotations

import dataclasses
import json

from hata.learn.hashattention import HashAttention
from hata.learn.hata_recipe import HataRecipe
from hata.learn.listwise import Listwise
from hata.learn.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (Listwise(), HataRecipe(), HashAttention())
}


def settings_of(recipe: Recipe) -> str:
    """A recipe's settings, in words."""
    return json.dumps(dataclasses.asdict(recipe), sort_keys=True)  # type: ignore[call-overload]
