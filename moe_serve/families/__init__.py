"""One row per model architecture: tensor names, router rule, constraints."""

from moe_serve.families.family import Family, Projections, Shape
from moe_serve.families.routing import Routing
from moe_serve.families.table import FAMILIES, family_of, rotates_slices, serving_obstacle

__all__ = [
    "FAMILIES",
    "Family",
    "Projections",
    "Routing",
    "Shape",
    "family_of",
    "rotates_slices",
    "serving_obstacle",
]
