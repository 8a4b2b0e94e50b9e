"""Frozen feature extractors: architectures, conversion of published weights, public pretraining."""
