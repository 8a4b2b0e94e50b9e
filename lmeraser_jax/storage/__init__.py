"""The workdir: catalog, checkpoints, requests."""
