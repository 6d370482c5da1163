"""One training run: its configuration, checkpoints, loggers and the signals that end it."""
