"""LMEraser with a common head: the mean of the five nearest clusters, and 0.3 of a ridge head of all records."""

TITLE = "LMEraser + ridge"
CHANGES = {
    "clustering.partition": "adaptive",
    "tuning.what": "prompt+head",
    "inference.nearest": 5,
    "common.what": "ridge",
    "inference.common": 0.3,
}
