"""One head: adaptive clusters with a prompt each and one head for all; a request re-tunes everything."""

TITLE = "one head"
CHANGES = {"clustering.partition": "adaptive", "tuning.method": "prompts+one head", "inference.nearest": 1}
