"""Pictures of a run: its losses, and the positions that it takes to be the same."""

from __future__ import annotations

from densecl_ext.visualize.losses import plot_losses
from densecl_ext.visualize.matches import Matches, find_matches, plot_matches

__all__ = ["Matches", "find_matches", "plot_losses", "plot_matches"]
