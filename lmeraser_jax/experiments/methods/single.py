"""Single prompt: one prompt and one head for all private data (visual prompting); a request re-tunes both."""

TITLE = "single prompt"
CHANGES = {"clustering.partition": "one", "tuning.method": "prompt+head"}
