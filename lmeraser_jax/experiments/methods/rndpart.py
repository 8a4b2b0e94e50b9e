"""RndPart prompt: LMEraser with random parts in the place of clusters; a hash of the image chooses who answers."""

TITLE = "random parts"
CHANGES = {"clustering.partition": "random", "tuning.method": "prompt+head", "inference.nearest": 1}
