"""Threads for every test, and the mark of those that need solo-learn's main branch."""

import importlib
import os

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def solo_learn_is_there() -> bool:
    try:
        importlib.import_module("solo.methods.base")
    except ImportError:
        return False
    return True


def pytest_collection_modifyitems(items):
    if solo_learn_is_there():
        return
    skip = pytest.mark.skip(reason="solo-learn's main branch is not on the path")
    for item in items:
        if "solo_learn" in item.keywords:
            item.add_marker(skip)
