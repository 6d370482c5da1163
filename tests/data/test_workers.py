"""Programs whose loaders have worker processes end by themselves."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from grap_solo.data.workers import build_loader

# The loader is still referred to at the end, as by a traceback; its workers ignore SIGTERM.
SCRIPT = """
import signal, sys, time, torch
from grap_solo.compose import CONFIGS, compose
from grap_solo.data import evaluation_loader, load_images, pretrain_loader

if __name__ == "__main__":
    start_method, kind, end = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored in a background job.
    torch.multiprocessing.set_start_method(start_method)
    changes = ["data.num_workers=1", f"++data.batched={kind == 'batched'}", "++data.fraction=0.1",
               "++data.format=image_folder", "++data.no_labels=false", "++seed=1"]
    cfg = compose(CONFIGS / "digits" / "all4one.yaml", [*changes, "optimizer.batch_size=8"])
    images = load_images(cfg.data, train=True)
    make = evaluation_loader if kind == "evaluated" else lambda c, i: pretrain_loader(c, i, 8)
    loader = make(cfg, images)
    batches = iter(loader)
    next(batches)
    print("loaded", flush=True)
    if end == "error":
        raise ValueError("an error")
    if end == "signal":
        time.sleep(600)
"""


@pytest.mark.parametrize(
    ("start_method", "kind", "end"),
    [
        ("fork", "batched", "success"),
        ("fork", "single", "error"),
        ("spawn", "batched", "error"),
        ("forkserver", "batched", "signal"),
        ("fork", "evaluated", "signal"),
    ],
)
def test_a_program_ends_with_its_loaders_workers(start_method, kind, end, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", script, start_method, kind, end],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout.readline() == "loaded\n", process.communicate()[1]
    if end == "signal":
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)  # An interrupted program ends as one that fails does.
    try:
        process.communicate(timeout=60)
    finally:
        process.kill()
    # After an interrupt Python forgets that it was one if an atexit function imports a NamedTuple.
    expected = {"success": {0}, "error": {1}, "signal": {-signal.SIGINT, 1}}
    assert process.returncode in expected[end]


def test_workers_end_with_an_iterator_that_is_in_a_cycle():
    """As after an error in a worker, where the exception refers to itself through its traceback."""
    batches = iter(build_loader([0, 1, 2, 3], 1, batch_size=1))
    next(batches)
    (worker,) = batches._workers
    cycle = [batches]
    cycle.append(cycle)
    del batches, cycle
    start = time.monotonic()
    gc.collect()
    assert not worker.is_alive() and time.monotonic() - start < 4  # torch gives up after 5 s.
