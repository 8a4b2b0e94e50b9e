"""The build, and what changes its live records."""
