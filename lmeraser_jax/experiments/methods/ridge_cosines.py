"""Ridge regression on frozen features and 512 random cosines of them: as exact, and not linear in the features."""

TITLE = "ridge + cosines"
CHANGES = {"clustering.partition": "one", "tuning.method": "ridge", "tuning.expand": 512}
