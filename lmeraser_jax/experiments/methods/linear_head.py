"""A linear head on frozen features, tuned like the heads of the others; a request tunes it again."""

TITLE = "linear head"
CHANGES = {"clustering.partition": "one", "tuning.method": "head", "data.augment": "none"}
