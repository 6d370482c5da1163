"""One training run: its configuration, its checkpoints, its loggers and the signals it obeys."""
