"""Retraining: the whole network is tuned on all private data, and again after every request."""

TITLE = "retrain all"
CHANGES = {"clustering.partition": "one", "tuning.method": "backbone"}
