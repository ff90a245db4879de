"""Samplers as tables: `build_table` makes one, `advance` moves any mix of them a step on."""

from fullpipe.samplers.catalog import SAMPLERS, UNSUPPORTED, build_table, get_sampler
from fullpipe.samplers.table import REGISTERS, Row, Sampler, Table, advance

__all__ = [
    "REGISTERS",
    "SAMPLERS",
    "UNSUPPORTED",
    "Row",
    "Sampler",
    "Table",
    "advance",
    "build_table",
    "get_sampler",
]
