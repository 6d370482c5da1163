"""Shared by several test files: small configurations, runs' files, processes that are started, and
a method over either base."""

import csv
import importlib
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing
from lightning.pytorch import Callback
from omegaconf import OmegaConf

import grap_solo
from grap_solo.cli import main
from grap_solo.compose import compose

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DIGITS = CONFIGS / "digits"
OWN = "lejepa:LeJEPA"  # The method of one's own beside this file.
# A fifth of the images: 3 steps an epoch.
SMALL = ["+data.fraction=0.2", "max_epochs=2", "scheduler.warmup_epochs=1"]
QUIET = ["+enable_progress_bar=false"]


def digits(directory, *overrides, file="grap"):
    """A small configuration of one of configs/digits' files; its runs go into ``directory``."""
    return compose(DIGITS / f"{file}.yaml", [*SMALL, f"checkpoint.dir={directory}", *overrides])


def quiet_digits(directory, *overrides, file="grap"):
    """As :func:`digits`, without a progress bar, each step logged, into ``directory/run``."""
    return digits(directory, *QUIET, "log_every_n_steps=1", "name=run", *overrides, file=file)


def method_digits(name, directory, *overrides):
    """The small configuration of any method; that of :data:`OWN` is VICReg's GraP file."""
    file = "grap_vicreg" if name == OWN else "grap" if name == "all4one" else f"grap_{name}"
    own = [f"method={OWN}"] if name == OWN else []
    return digits(directory, *QUIET, "name=run", *own, *overrides, file=file)


def rows_of(file):
    """A CSV file's rows, each a dictionary by column."""
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


class Killed(Exception):
    """Stands for the end of a process that gets no warning."""


def killed_at(hook, epoch):
    """A callback that raises :class:`Killed` at one of Lightning's hooks, in one epoch."""

    def stop(self, trainer, *args):
        if trainer.current_epoch == epoch and not trainer.sanity_checking:
            raise Killed

    return type("Stop", (Callback,), {hook: stop})()


# A server imports the package once, and each process is a fork of it: that saves ten seconds each.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["grap_solo.training.run", "grap_solo.data", "helpers"])


def start_process(output, function, *arguments, cwd=None):
    """Calls a module's function in a process, and a process group, of its own.

    Args:
        output: the file that gets what it prints.
        function: what it returns is the exit code.
        arguments: of the function.
        cwd: the folder to start in.

    Returns:
        A ``multiprocessing.Process``, with one thread for torch.
    """
    process = SERVER.Process(target=_call, args=(output, cwd or os.getcwd(), function, arguments))
    process.start()
    return process


def _call(output, cwd, function, arguments):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored in a background job.
    os.chdir(cwd)
    torch.set_num_threads(1)
    with open(output, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.exit(function(*arguments))


def start_command(output, *arguments, cwd=None):
    """Starts ``grap-solo`` with these arguments, as :func:`start_process` does."""
    return start_process(output, main, list(map(str, arguments)), cwd=cwd)


def output_of(process, output, code=0):
    """Waits for a process and returns its output; fails if its exit code is another one."""
    process.join()
    text = output.read_text()
    assert process.exitcode == code, text[-3000:]
    return text


def in_two_processes(function, *arguments):
    """Calls a module's function in two processes with the environment that torchrun gives them.

    Raises:
        torch.multiprocessing.ProcessExitedException: one has ended with another exit code than 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = port, function, arguments
    torch.multiprocessing.start_processes(_call_rank, given, nprocs=2, start_method="forkserver")


def _call_rank(rank, port, function, arguments):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="none",
    )  # fmt: skip
    function(*arguments)


def same_in_both(tensors):
    """Whether both processes have the same tensors, to the bit."""
    same = []
    for value in tensors:
        parts = [torch.empty_like(value) for _ in range(2)]
        torch.distributed.all_gather(parts, value.detach().contiguous())
        same.append(torch.equal(*parts))
    return bool(same) and all(same)


def decided_modules():
    """The modules that depend on which base was taken."""
    below = ("grap_solo.solo", "grap_solo.methods")
    return [name for name in sys.modules if name.startswith(below)]


def method_over(base: str, monkeypatch, name="all4one", absent=()):
    """A method's class over the ``own`` or ``solo_learn``'s base, whatever is installed.

    Args:
        base: which.
        monkeypatch: pytest's.
        name: of the method.
        absent: further modules that cannot be imported.
    """
    with monkeypatch.context() as patch:
        for each in ("methods", "solo"):  # An import sets them, and the context sets them back.
            patch.setattr(grap_solo, each, getattr(grap_solo, each, None), raising=False)
        if base == "solo_learn":  # Importing a fresh copy registers its methods there.
            theirs = importlib.import_module("solo.methods").METHODS
            patch.setattr("solo.methods.METHODS", dict(theirs))
        for each in decided_modules():
            patch.delitem(sys.modules, each)
        for each in [*absent, *(["solo", "solo.methods.base"] if base == "own" else [])]:
            patch.setitem(sys.modules, each, None)
        methods = importlib.import_module("grap_solo.methods")
        decided = sys.modules["grap_solo.solo"].BASE
        # What the patch deleted comes back with its context, and the fresh copies go.
        for each in decided_modules():
            patch.setitem(sys.modules, each, sys.modules[each])
    assert decided == {"own": "grap_solo", "solo_learn": "solo-learn"}[base]
    return methods.METHODS[name]


def take_step(model, batch, number=0):
    """A step up to the optimiser's, as Lightning takes it; returns the loss."""
    loss = model.training_step(batch, number)
    loss.backward()
    model.on_after_backward()
    return loss


METHOD_KWARGS = {
    "all4one": {
        "temperature": 0.2,
        "proj_hidden_dim": 32,
        "proj_output_dim": 16,
        "pred_hidden_dim": 24,
        "queue_size": 40,
    },
    "vicreg": {"proj_hidden_dim": 32, "proj_output_dim": 16},
    "vibcreg": {"proj_hidden_dim": 32, "proj_output_dim": 192, "iternorm": True},  # 64 groups of 3.
    # Weights that float32 holds exactly: solo-learn's are Python's.
    "barlow_twins": {
        "proj_hidden_dim": 32,
        "proj_output_dim": 16,
        "scale_loss": 2**-3,
        "lamb": 2**-8,
    },
}


def all4one_config(**changes):
    return method_config("all4one", **changes)


def method_config(method, **changes):
    """A method as ``parse_cfg`` leaves it, small: resnet18 on 8 images, a queue of 40."""
    cfg = OmegaConf.create(
        {
            "name": "test",
            "method": method,
            "backbone": {"name": "resnet18", "kwargs": {}},
            "method_kwargs": METHOD_KWARGS.get(method, {}),
            "momentum": {"base_tau": 0.9, "final_tau": 1.0},
            "data": {
                "dataset": "cifar10",
                "num_classes": 10,
                "num_large_crops": 2,
                "num_small_crops": 0,
            },
            "optimizer": {
                "name": "lars",
                "batch_size": 8,
                "lr": 0.5,
                "classifier_lr": 0.1,
                "weight_decay": 1e-5,
                "kwargs": {
                    "momentum": 0.9,
                    "clip_lr": True,
                    "eta": 0.02,
                    "exclude_bias_n_norm": True,
                },
            },
            "scheduler": {"name": "warmup_cosine", "warmup_epochs": 1},
            "max_epochs": 4,
            "weighting": {"name": "fixed"},
        }
    )
    return OmegaConf.merge(cfg, OmegaConf.create(changes))


def image_batch(size=32, batch=8, seed=0, classes=10):
    """``[indexes, [view1, view2], labels]`` of random images, (B, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(batch, 3, size, size, generator=generator) for _ in range(2)]
    labels = torch.randint(0, classes, (batch,), generator=generator)
    return [torch.arange(batch) + batch * seed, views, labels]
