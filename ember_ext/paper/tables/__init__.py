"""The tables of the paper, with the numbers of this project beside the published ones."""

from ember_ext.paper.tables.catalogue import tables
from ember_ext.paper.tables.table import Table

__all__ = ["Table", "tables"]
