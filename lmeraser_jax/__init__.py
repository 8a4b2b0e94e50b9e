"""Exact machine unlearning for large vision models: LMEraser (AISTATS 2025) on JAX.

The package root stays free of heavy imports, so that `lmeraser --help` answers at once.
"""

__version__ = "0.1.0"
