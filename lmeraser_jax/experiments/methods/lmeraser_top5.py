"""LMEraser whose answer is the mean of the five nearest clusters' probabilities."""

TITLE = "LMEraser, 5 nearest"
CHANGES = {"clustering.partition": "adaptive", "tuning.method": "prompt+head", "inference.nearest": 5}
