"""Threads for every test, which tests are skipped, and how two workers share the tests."""

import functools
import importlib
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session", autouse=True)
def own_compiler_cache(tmp_path_factory):
    """A compiler that was killed can leave half a file in the cache that all processes share."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


# The markers of tests that compare with others' code: what is imported, and why it is skipped.
OTHERS_CODE = {
    "solo_learn": ("solo.methods.base", "solo-learn's main branch is not on the path"),
    "aligned_hpo": ("aligned_hpo", "aligned-hpo, or the datasketches it needs, is not on the path"),
}


def can_be_imported(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


@functools.cache
def shares_fixture(file: Path) -> bool:
    """Whether a file has a fixture that all its tests share."""
    return 'scope="module"' in file.read_text()


def pytest_collection_modifyitems(items):
    for marker, (module, reason) in OTHERS_CODE.items():
        if not can_be_imported(module):
            for item in items:
                if marker in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=reason))
    # Slow tests come first, so that no worker is left alone with one of them at the end.
    slow = {item.path for item in items if "slow" in item.keywords and shares_fixture(item.path)}
    items.sort(key=lambda item: item.path not in slow and "slow" not in item.keywords)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests that share a fixture stay in one worker, which then makes it once.

    xdist's own groups (``--dist loadgroup``) have no effect with pytest 9.2: xdist 3.8 puts a
    test's group into an attribute that pytest no longer reads."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if shares_fixture(config.rootpath / file) else nodeid

    return ByFixture(config, log)
