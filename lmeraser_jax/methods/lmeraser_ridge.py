"""LMEraser with a common head: as many nearest clusters as the config says, and 0.3 of a ridge head of all records."""

TITLE = "LMEraser + ridge"
CHANGES = {
    "clustering.partition": "adaptive",
    "tuning.what": "prompt+head",
    "common.what": "ridge",
    "inference.common": 0.3,
}
