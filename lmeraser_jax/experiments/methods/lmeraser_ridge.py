"""LMEraser with a common head: the nearest clusters and a ridge head of all records, weighted as the config says."""

TITLE = "LMEraser + ridge"
CHANGES = {
    "clustering.partition": "adaptive",
    "tuning.method": "prompt+head",
    "common.method": "ridge",
}
