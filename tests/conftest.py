"""Threads for every test, which tests are skipped, and how two workers share the tests."""

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


def uses_module_fixture(item) -> bool:
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    return any(definitions[-1].scope == "module" for definitions in fixtures)


@pytest.hookimpl(tryfirst=True)  # Before xdist reads the groups.
def pytest_collection_modifyitems(items):
    if not solo_learn_is_there():
        skip = pytest.mark.skip(reason="solo-learn's main branch is not on the path")
        for item in items:
            if "solo_learn" in item.keywords:
                item.add_marker(skip)
    # Tests that share a module's fixture stay in one worker, which then makes it once. Slow tests
    # come first, so that no worker is left alone with one of them at the end.
    groups = {}
    for item in items:
        groups[item] = item.nodeid
        if uses_module_fixture(item):
            groups[item] = item.path.stem
            item.add_marker(pytest.mark.xdist_group(groups[item]))
    slow = {group for item, group in groups.items() if "slow" in item.keywords}
    items.sort(key=lambda item: groups[item] not in slow)
