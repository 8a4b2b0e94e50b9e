"""Attempts to find erased records in a model."""
