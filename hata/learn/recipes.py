"""The recipes that there are, by name."""

from __future__ import annotations

from hata.learn.hashattention import HashAttention
from hata.learn.hata_recipe import HataRecipe
from hata.learn.listwise import Listwise
from hata.learn.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (Listwise(), HataRecipe(), HashAttention())
}
