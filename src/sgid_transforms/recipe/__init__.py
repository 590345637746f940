"""What to generate: the recipe and everything it is made of."""

from sgid_transforms.recipe.guidance import SimilarityGuidance
from sgid_transforms.recipe.recipe import Filters, Recipe

__all__ = ["Filters", "Recipe", "SimilarityGuidance"]
