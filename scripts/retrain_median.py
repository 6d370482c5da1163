#!/usr/bin/env python
"""Retrains from scratch with the median weights of runs: scripts/retrain_median.py RUN_DIR ..."""

import sys

from grap_solo.cli import main

if __name__ == "__main__":
    sys.exit(main(["retrain", *sys.argv[1:]]))
