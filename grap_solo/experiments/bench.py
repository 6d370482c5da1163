"""What a step costs: contenders in turns in one process, and each one's peak memory."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import seed_everything
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from grap_solo.balance import Step, balance
from grap_solo.compose import CONFIGS, compose
from grap_solo.errors import ConfigError, unknown_name
from grap_solo.evaluation.offline import device_of
from grap_solo.methods import METHODS, find_method, weighted_name
from grap_solo.report.tables import markdown
from grap_solo.solo import BASE
from grap_solo.solo.backbones import build_backbone
from grap_solo.training.config import prepare
from grap_solo.weighting import Statistics, build_weighting

PAIRS = (
    ("grap", "fixed"),
    ("grap", "solo_learn"),
    ("grap", "torchjd"),
    ("grap", "k_backwards"),
    ("grap_compiled", "solo_learn"),
    ("grap_compiled", "grap"),
    ("fixed", "solo_learn"),
)
WAITS = ("_local_scalar_dense", "is_nonzero", "masked_select", "nonzero", "equal")
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}


# ---- contenders -----------------------------------------------------------------------------


class Contender:
    """A method and its optimiser, on one batch again and again.

    A step is forward, backward, the optimiser's and the momentum update, each contender's own;
    loading data is left out.

    Args:
        cfg: a prepared configuration, ``data.num_classes`` included.
        batch: ``[indexes, [view1, view2], labels]``.
        base: the method's class; ours, by its name, when None.
        surrogate: what takes the place of :func:`~grap_solo.balance.balance` in the step.
    """

    def __init__(
        self,
        cfg: DictConfig,
        batch: list[Any],
        base: Any = None,
        surrogate: Callable[..., Step] | None = None,
    ) -> None:
        seed_everything(cfg.seed, verbose=False)
        self.device = device_of(cfg)
        cfg.scheduler.name = "none"
        self.model: Any = (base or find_method(cfg.method))(cfg).to(self.device).train()
        if not cfg.performance.disable_channel_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.model.parameter_space_every = 0  # Without a trainer every step is the first.
        self.model.log = self.model.log_dict = lambda *args, **kwargs: None
        self.optimizer = self.model.configure_optimizers()
        dtype = PRECISIONS.get(str(cfg.get("precision")))
        self.autocast: Any = (
            nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)
        )
        if surrogate is not None:
            self.model.balance = partial(surrogate, self.model)
        indexes, views, labels = batch
        batch = [
            indexes.to(self.device),
            [each.to(self.device) for each in views],
            labels.to(self.device),
        ]
        held_out = cfg.labels.split == "held_out"
        self.batch: Any = {"train": batch, "labelled": batch} if held_out else batch

    def seconds(self) -> float:
        """The time of one step."""
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self._backward()
        self.optimizer.step()
        if hasattr(self.model, "update_weighting_after_step"):
            self.model.update_weighting_after_step()
        self.update_momentum()
        self._wait()
        return time.perf_counter() - start

    def update_momentum(self) -> None:
        """Averages the momentum networks, if the method has any."""
        for pair in getattr(self.model, "momentum_pairs", ()):
            self.model.momentum_updater.update(*pair)

    def _backward(self) -> None:
        with self.autocast:
            loss = self.model.training_step(self.batch, 0)
        loss.backward()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Batch = list[Any]
Terms = Callable[..., Mapping[str, Tensor]]


def k_backwards(
    model: nn.Module,
    embeddings: Sequence[Tensor],
    terms: Terms,
    downstream: Callable[..., Tensor],
    weighting: nn.Module,
    *_: Any,
) -> Step:
    """GraP without the surrogate, on the backbone's parameters (arXiv 2605.07756, Eq. 12): one
    backward pass through the backbone for each loss."""
    backbone, heads = _parameters(model)
    losses, down = list(terms(*embeddings).values()), downstream(*embeddings)
    rows = [torch.autograd.grad(each, backbone, retain_graph=True) for each in (*losses, down)]
    *vectors, target = (torch.cat([each.flatten() for each in row]) for row in rows)
    matrix = torch.stack(vectors)
    found = Statistics(
        losses=torch.stack(losses).detach(),
        gramian=matrix @ matrix.T,
        products=matrix @ target,
        downstream_norm=target.norm(),
    )
    weights = weighting(found)
    composite = weights @ matrix
    sizes = [each.numel() for each in backbone]
    for parameter, gradient in zip(backbone, composite.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)
    torch.stack([*losses, down]).sum().backward(inputs=heads)
    return _done(weights, found)


def torchjd_step(
    model: nn.Module,
    embeddings: Sequence[Tensor],
    terms: Terms,
    downstream: Callable[..., Tensor],
    weighting: nn.Module,
    *_: Any,
) -> Step:
    """torchjd's ``mtl_backward``, one term at a time, and UPGrad of the Jacobians."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    backbone, _heads = _parameters(model)
    losses = list(terms(*embeddings).values())
    downstream(*(each.detach() for each in embeddings)).backward()
    mtl_backward(losses, features=list(embeddings), parallel_chunk_size=1, retain_graph=True)
    jac_to_grad(backbone, UPGrad())
    return _done(torch.ones(len(losses)), Statistics(torch.stack(losses).detach()))


def _parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The backbone's, and those of heads and probe."""
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    backbone = [each for name, each in named if name.startswith("backbone.")]
    return backbone, [each for name, each in named if not name.startswith("backbone.")]


def _done(weights: Tensor, found: Statistics) -> Step:
    """A step whose gradients are there already: its loss has none left to give."""
    loss = torch.zeros((), device=found.losses.device, requires_grad=True)
    return Step(loss, {}, loss.detach(), weights, found, loss.detach() == 0)


def random_batch(cfg: DictConfig) -> Batch:
    """``[indexes, [view1, view2], labels]`` of random images of a configuration's size."""
    size, count = cfg.augmentations[0].crop_size, cfg.optimizer.batch_size
    generator = torch.Generator().manual_seed(cfg.seed)
    views = [torch.randn(count, 3, size, size, generator=generator) for _ in range(2)]
    return [torch.arange(count), views, torch.arange(count) % cfg.data.num_classes]


# ---- turns ----------------------------------------------------------------------------------


def in_turns(
    contenders: Mapping[str, Callable[[], float]], rounds: int, warmup: int
) -> dict[str, list[float]]:
    """The seconds of every round: each contender's turn comes once in each.

    Args:
        contenders: what runs a step and returns its seconds, by name.
        rounds: how often each is timed.
        warmup: rounds before that.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, step in contenders.items():
            seconds = step()
            if turn >= warmup:
                times[name].append(seconds)
    return times


def ratio(mine: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """``median``, ``min`` and ``max`` of the rounds' ratios."""
    ratios = [a / b for a, b in zip(mine, others, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def step_costs(
    configs: Mapping[str, DictConfig], base: str, rounds: int = 15, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Each configuration's time of a step by that of ``base``: see :class:`Contender`.

    Args:
        configs: prepared configurations, ``data.num_classes`` included, by name.
        base: the name that the others are compared with; its batch is everyone's.
        rounds: see :func:`in_turns`.
        warmup: see :func:`in_turns`.

    Returns:
        By name, ``median``, ``min`` and ``max`` of the rounds' ratios, and ``ms``, the median
        time of a step in milliseconds.
    """
    batch = random_batch(configs[base])
    contenders = {name: Contender(cfg, batch).seconds for name, cfg in configs.items()}
    times = in_turns(contenders, rounds, warmup)
    return {
        name: ratio(mine, times[base]) | {"ms": 1000 * statistics.median(mine)}
        for name, mine in times.items()
    }


# ---- the step of a method -------------------------------------------------------------------


def contender(
    name: str, method: str, batch_size: int, accelerator: str, precision: str
) -> Contender:
    """One of :func:`bench_step`'s, by name.

    Args:
        name: ``fixed``, ``grap``, ``grap_compiled``, ``k_backwards``, ``torchjd`` or
            ``solo_learn``.
        method: one of the methods.
        batch_size: images of a step.
        accelerator: ``cpu`` or ``gpu``.
        precision: ``32-true`` or ``bf16-mixed``.
    """
    changes = [f"accelerator={accelerator}", "devices=1", f"optimizer.batch_size={batch_size}"]
    changes += [f"precision={precision}", f"method={weighted_name(method)}", "optimizer.lr=1e-4"]
    changes += [f"+performance.compile={name == 'grap_compiled'}"]
    rule = "fixed" if name in ("fixed", "solo_learn") else "grap"
    changes.append(f"+weighting={{name: {rule}}}")
    cfg = prepare(compose(CONFIGS / "cifar10" / f"{method}.yaml", changes))
    cfg.data.num_classes = 10
    surrogate = {"k_backwards": k_backwards, "torchjd": torchjd_step}.get(name)
    base: Any = None
    if name == "solo_learn":
        from solo.methods import METHODS as theirs

        base = theirs[method]
    return Contender(cfg, random_batch(cfg), base, surrogate)


def bench_step(
    batch_size: int = 64,
    rounds: int = 7,
    accelerator: str = "cpu",
    precision: str = "32-true",
    only: Sequence[str] | None = None,
    method: str | None = None,
) -> dict[str, Any]:
    """One optimiser step of a method: its CIFAR-10 configuration, ResNet-18 with the CIFAR stem.

    ``fixed`` and ``grap`` are ours, ``grap_compiled`` has ``performance.compile``,
    ``k_backwards`` is GraP by :func:`k_backwards`, ``torchjd`` by :func:`torchjd_step`, and
    ``solo_learn`` its own class of the method, where its main branch is on the path.

    Args:
        batch_size: images of a step, two views each.
        rounds: how often each is timed, after one round that is not.
        accelerator: see :func:`contender`.
        precision: see :func:`contender`.
        only: the contenders; when None, all but ``grap_compiled``, which needs a C++ compiler.
        method: one of the methods, without ``grap_``; the first of them when None.

    Returns:
        ``ratios`` as :func:`ratio` by ``a/b``, ``seconds``, the median step, and ``peak_mib``:
        the most that torch has allocated in a step beyond what was there before it.

    Raises:
        ConfigError: a method or contender that is not there, or no folder of configurations.
    """
    if not CONFIGS.is_dir():
        raise ConfigError(f"{CONFIGS}: no such folder: run it from a clone of the repository")
    method = method or next(iter(METHODS))
    if method not in METHODS:
        raise unknown_name("--method", method, METHODS)
    names = ["fixed", "grap", "grap_compiled", "k_backwards", "torchjd"]
    names += ["solo_learn"] if BASE == "solo-learn" else []
    for name in only or ():
        if name not in names:
            raise unknown_name("--only", name, names)
    chosen = only or [name for name in names if name != "grap_compiled"]
    names = [name for name in names if name in chosen]
    made = {name: contender(name, method, batch_size, accelerator, precision) for name in names}
    peaks = {name: peak_memory(mine) for name, mine in made.items()}
    times = in_turns({name: mine.seconds for name, mine in made.items()}, rounds, warmup=1)
    return {
        "method": method,
        "batch_size": batch_size,
        "accelerator": accelerator,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "base": BASE,
        "rounds": rounds,
        "ratios": {f"{a}/{b}": ratio(times[a], times[b]) for a, b in PAIRS if {a, b} <= {*names}},
        "seconds": {name: statistics.median(mine) for name, mine in times.items()},
        "peak_mib": peaks,
    }


def peak_memory(mine: Contender) -> float:
    """What a step allocates at most beyond what is there before it, in MiB."""
    mine.seconds()  # The optimiser's buffers are there after the first step.
    if mine.device.type == "cuda":
        mine.optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mine.seconds()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # It speaks of GPUs that are not there.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        mine.seconds()
    with NamedTemporaryFile(suffix=".json") as file:
        found.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    live: dict[int, int] = {}  # What was there before it, and is freed in it, does not count.
    now = peak = 0
    changes = [each for each in events if each["name"] == "[memory]"]
    for change in sorted(changes, key=lambda each: each["ts"]):
        size, address = change["args"]["Bytes"], change["args"]["Addr"]
        if size > 0:
            live[address] = size
            now += size
        else:
            now -= live.pop(address, 0)
        peak = max(peak, now)
    return peak / 2**20


class Operators(TorchDispatchMode):
    """What is started while it is entered.

    Attributes:
        operators: how many operators.
        waits: the names of those for which the host waits, on a GPU: for a value, or for the size
            of what a mask selects.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.waits = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        self.operators += 1
        indexes = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(each is not None and each.dtype == torch.bool for each in indexes)
        if masked or name in WAITS:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def count_operators(function: Callable[[], Any]) -> Operators:
    """What a function starts."""
    with ExitStack() as patches, Operators() as found:
        for name in ("tolist", "cpu", "numpy"):  # On a CPU no operator tells of them.
            original = getattr(Tensor, name)

            def told(each: Tensor, *args: Any, f: Any = original, n: str = name) -> Any:
                found.waits.append(n)
                return f(each, *args)

            patches.enter_context(mock.patch.object(Tensor, name, told))
        function()
    return found


# ---- growth with the number of terms --------------------------------------------------------


def bench_terms(
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32), batch_size: int = 64, rounds: int = 15
) -> dict[str, Any]:
    """How a step grows with K terms on one embedding: a ResNet-18 with the CIFAR stem and, for each
    term, a head of two layers that regresses random targets, on the CPU.

    Args:
        counts: the numbers of terms.
        batch_size: images of a step.
        rounds: see :func:`in_turns`.

    Returns:
        ``ratios``: of a GraP step by that of plain training, by K.
    """
    return {
        "batch_size": batch_size,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "ratios": {str(count): _grap_to_plain(count, batch_size, rounds) for count in counts},
    }


def _grap_to_plain(count: int, batch_size: int, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    backbone, features = build_backbone("resnet18", "cifar10", {})
    names = [f"term{k}" for k in range(count)]
    heads = nn.ModuleDict(
        {k: nn.Sequential(nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, 128)) for k in names}
    )
    probe = nn.Linear(features, 10)
    images, targets = torch.randn(batch_size, 3, 32, 32), torch.randn(batch_size, 128)
    labels = torch.arange(batch_size) % 10
    modules = nn.ModuleList([backbone, heads, probe]).to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(modules.parameters(), lr=1e-4)

    def seconds(rule: str) -> Callable[[], float]:
        weighting = build_weighting({"name": rule}, names)

        def step() -> float:
            start = time.perf_counter()
            optimizer.zero_grad()
            balance(
                backbone(images),
                lambda z: {k: F.mse_loss(head(z), targets) for k, head in heads.items()},
                lambda z: F.cross_entropy(probe(z), labels),
                weighting,
            ).loss.backward()
            optimizer.step()
            return time.perf_counter() - start

        return step

    times = in_turns({rule: seconds(rule) for rule in ("grap", "equal")}, rounds, warmup=2)
    return ratio(times["grap"], times["equal"])


# ---- what is printed ------------------------------------------------------------------------


def table_of_ratios(found: Mapping[str, Any]) -> str:
    """A Markdown table of ``ratios``, and one of ``seconds`` and ``peak_mib`` if there are any."""
    rows = [["ratio of step times", "median", "min", "max"]]
    for name, each in found["ratios"].items():
        rows.append([name, *(f"{each[key]:.3f}" for key in ("median", "min", "max"))])
    text = markdown(rows)
    if "seconds" in found:
        rows = [["contender", "seconds a step", "images a second", "peak memory, MiB"]]
        for name, seconds in found["seconds"].items():
            rate = found["batch_size"] / seconds
            rows.append([name, f"{seconds:.3f}", f"{rate:.1f}", f"{found['peak_mib'][name]:.0f}"])
        text += f"\n\n{markdown(rows)}"
    settings = {k: v for k, v in found.items() if isinstance(v, (int, str))}
    return text + "\n\n" + ", ".join(f"{key} {value}" for key, value in settings.items())
