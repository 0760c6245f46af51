"""How a weight matrix is stored: as plain numbers, or as codes with scales.

Everything else asks a :class:`Scheme` for a matrix [rows, columns] and never names its tensors.
"""

from moe_serve.checkpoint.quantisation.carry import Renumbering, renumbered_settings
from moe_serve.checkpoint.quantisation.detect import (
    logical_name,
    quantisation_settings,
    scheme_of,
)
from moe_serve.checkpoint.quantisation.scheme import COLUMNS, ROWS, InexactJoin, Matrix, Scheme

__all__ = [
    "COLUMNS",
    "ROWS",
    "InexactJoin",
    "Matrix",
    "Renumbering",
    "Scheme",
    "logical_name",
    "quantisation_settings",
    "renumbered_settings",
    "scheme_of",
]
