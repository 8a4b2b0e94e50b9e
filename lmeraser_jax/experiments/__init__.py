"""Comparisons, costs and the demo."""
