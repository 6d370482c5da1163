"""The run folder: every file name, its writer and its reader."""
