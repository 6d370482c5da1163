"""Arrays that several processes share."""

import errno
import multiprocessing
import os

import numpy as np
import pytest
import torch
from helpers import quiet_digits
from small_tasks import take_shared

from grap_solo.data import batched, evaluation_loader, load_both, pretrain_loader, shared
from grap_solo.data.datasets import Digits
from grap_solo.data.shared import make_or_share, shared_arrays
from grap_solo.training.config import prepare


def refuse():
    raise AssertionError("made again")


def make(calls=None):
    if calls is not None:
        calls.append(1)
    return np.arange(6, dtype=np.uint8).reshape(2, 3)


def test_one_of_several_processes_makes_an_array_and_all_map_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(4)
    with shared_arrays(tmp_path / "shared"):
        each = [context.Process(target=take_shared, args=(queue, barrier)) for _ in range(4)]
        for process in each:
            process.start()
        found = [queue.get(timeout=300) for _ in each]
        for process in each:
            process.join()
    assert sorted(made for made, _, _ in found) == [0, 0, 0, 1]
    assert all(array == make().tolist() and mapped for _, array, mapped in found)
    assert not (tmp_path / "shared").exists()


def test_an_array_is_shared_by_its_key_alone(tmp_path):
    with shared_arrays(tmp_path / "shared"):
        first = make_or_share({"a": 1, "b": 2}, make)
        again = make_or_share({"b": 2, "a": 1}, refuse)
        other = make_or_share({"a": 1, "b": 3}, lambda: np.zeros(1))
        first[0, 0] = 9  # In this process's copy.
        assert again[0, 0] == 0 and other.tolist() == [0]
        assert first.dtype == np.uint8 and first.shape == (2, 3)
    assert again.tolist() == make().tolist()  # Still there for who has it.


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(shared.FOLDER_VARIABLE, raising=False)
    calls = []
    make_or_share("key", lambda: make(calls)), make_or_share("key", lambda: make(calls))
    assert len(calls) == 2


def test_arrays_of_an_earlier_command_are_not_taken(tmp_path):
    folder, calls = tmp_path / "shared", []
    folder.mkdir()
    with shared_arrays(folder):
        make_or_share("key", make)
        (file,) = folder.glob("*.npy")
        content = file.read_bytes()
    folder.mkdir()
    (folder / file.name).write_bytes(content[:-6] + b"\7" * 6)  # As a killed command leaves it.
    with shared_arrays(folder):
        assert make_or_share("key", lambda: make(calls)).tolist() == make().tolist()
    assert calls and shared.FOLDER_VARIABLE not in os.environ


@pytest.mark.parametrize("fault", ["save", "open"])
def test_a_full_disk_costs_memory_and_no_run(fault, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with shared_arrays(tmp_path / "shared"):
        if fault == "save":
            monkeypatch.setattr(np, "save", full)
        else:
            os.environ[shared.FOLDER_VARIABLE] = str(tmp_path / "gone")
        assert make_or_share("key", make).tolist() == make().tolist()
        assert not list((tmp_path / "shared").glob("*.part"))


def all_batches(cfg, images, validation):
    loaders = pretrain_loader(cfg, images, 16), evaluation_loader(cfg, validation, keep=True)
    return [each for loader in loaders for batch in loader for each in flat(batch)]


def flat(batch):
    return [tensor for each in batch for tensor in (each if isinstance(each, list) else [each])]


@pytest.mark.parametrize("seed", [5, 6])
def test_runs_that_share_images_see_the_same_batches(seed, tmp_path, monkeypatch):
    cfg = prepare(quiet_digits(tmp_path, f"seed={seed}", "data.batched=true"))
    images, validation = load_both(cfg.data, cfg.labels)
    alone = all_batches(cfg, images, validation)
    decoded = []
    decode = batched.decode
    monkeypatch.setattr(batched, "decode", lambda part: decoded.append(1) or decode(part))
    with shared_arrays(tmp_path / "shared"):
        for _ in range(2):
            together = all_batches(cfg, images, validation)
            assert len(together) == len(alone)
            assert all(torch.equal(a, b) for a, b in zip(alone, together))
        assert len(list((tmp_path / "shared").glob("*.npy"))) == 2  # Training and validation.
    assert len(decoded) == 1


def test_parts_that_differ_are_not_mixed_up(tmp_path):
    def described(*changes, part="train"):
        cfg = prepare(quiet_digits(tmp_path, *changes))
        return str(batched.describe_part(cfg, Digits(True), part))

    held_out = ["+labels={split: held_out, fraction: 0.2}"]
    assert described("seed=5") == described("seed=6")
    assert described() != described(part="labelled")
    assert described("data.fraction=0.5") != described("data.fraction=0.6")
    assert described(*held_out, "seed=5") != described(*held_out, "seed=6")
