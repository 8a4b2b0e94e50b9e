"""A run's workdir: catalog (SQLite), checkpoints (Orbax), image cache; the only code that writes to it."""
