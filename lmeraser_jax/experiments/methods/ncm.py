"""Nearest class mean on frozen features: erasure is a subtraction of whole numbers, and exact."""

TITLE = "nearest class mean"
CHANGES = {"clustering.partition": "one", "tuning.method": "ncm"}
