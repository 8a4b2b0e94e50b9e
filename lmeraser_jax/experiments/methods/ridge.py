"""Ridge regression on frozen features: erasure is a subtraction of whole numbers, and exact."""

TITLE = "ridge"
CHANGES = {"clustering.partition": "one", "tuning.method": "ridge"}
