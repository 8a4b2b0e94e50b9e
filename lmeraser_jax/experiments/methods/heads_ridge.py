"""Clusters without prompts: linear heads on features, as many as there are clusters, beside a ridge head of all."""

TITLE = "heads + ridge"
CHANGES = {
    "clustering.partition": "adaptive",
    "tuning.method": "head",
    "data.augment": "none",
    "common.method": "ridge",
}
