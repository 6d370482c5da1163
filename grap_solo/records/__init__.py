"""The run folder: its file names, the recorder that writes it, and the readers."""
