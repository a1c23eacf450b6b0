"""Pictures of a run: its curves, what its features look like, and what they take to be the same."""

from __future__ import annotations

from densecl_ext.visualize.features import feature_colours, plot_features
from densecl_ext.visualize.losses import plot_losses
from densecl_ext.visualize.matches import Matches, find_matches, plot_matches
from densecl_ext.visualize.pairs import plot_pair_matches
from densecl_ext.visualize.report import write_report
from densecl_ext.visualize.segmentations import plot_segmentations

__all__ = [
    "Matches",
    "feature_colours",
    "find_matches",
    "plot_features",
    "plot_losses",
    "plot_matches",
    "plot_pair_matches",
    "plot_segmentations",
    "write_report",
]
