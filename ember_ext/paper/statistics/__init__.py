"""Measures of finished runs, and statistics over seeds."""

from ember_ext.paper.statistics.comparisons import compare, measure_noise
from ember_ext.paper.statistics.paired import NoiseFloor, PairedComparison, compare_paired

__all__ = ["NoiseFloor", "PairedComparison", "compare", "compare_paired", "measure_noise"]
