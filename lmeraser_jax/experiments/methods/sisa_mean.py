"""SISA (Bourtoule et al., 2021) over prompts and heads: S shards of R slices each, mean of the probabilities."""

TITLE = "SISA, mean"
CHANGES = {
    "clustering.partition": "random",
    "tuning.method": "prompt+head",
    "inference.nearest": 0,
    "inference.aggregate": "mean",
}
