"""LMEraser: adaptive clusters, a prompt and a head for each, the nearest cluster answers."""

TITLE = "LMEraser"
CHANGES = {"clustering.partition": "adaptive", "tuning.method": "prompt+head", "inference.nearest": 1}
