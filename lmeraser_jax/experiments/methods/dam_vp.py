"""DAM-VP without heads: adaptive clusters, a prompt for each, fixed features stand for the classes."""

TITLE = "DAM-VP"
CHANGES = {"clustering.partition": "adaptive", "tuning.method": "prompt", "inference.nearest": 1}
