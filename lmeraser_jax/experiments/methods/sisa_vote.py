"""SISA (Bourtoule et al., 2021) over prompts and heads: S shards of R slices each, majority vote."""

TITLE = "SISA, vote"
CHANGES = {
    "clustering.partition": "random",
    "tuning.method": "prompt+head",
    "inference.nearest": 0,
    "inference.aggregate": "vote",
}
