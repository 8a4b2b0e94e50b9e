"""Features, clusters and the tuning program."""
