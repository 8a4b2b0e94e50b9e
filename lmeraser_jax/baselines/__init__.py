"""Simpler methods on the same frozen features, for an honest comparison."""
