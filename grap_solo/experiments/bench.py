"""Benchmarks a training step: GraP against plain training and other ways to balance terms."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grap_solo.balance import Step, balance
from grap_solo.compose import compose
from grap_solo.errors import unknown_name
from grap_solo.experiments.counting import peak_memory
from grap_solo.experiments.timing import Contender, in_turns, random_batch, ratio
from grap_solo.methods import METHODS, weighted_name
from grap_solo.packaged import find_packaged
from grap_solo.report.tables import markdown
from grap_solo.solo import BASE
from grap_solo.solo.backbones import build_backbone
from grap_solo.training.config import prepare
from grap_solo.weighting import Statistics, build_weighting

CONTENDERS = ("fixed", "grap", "grap_compiled", "k_backwards", "torchjd", "solo_learn")
PAIRS = (
    ("grap", "fixed"),
    ("grap", "solo_learn"),
    ("grap", "torchjd"),
    ("grap", "k_backwards"),
    ("grap_compiled", "solo_learn"),
    ("grap_compiled", "grap"),
    ("fixed", "solo_learn"),
)


# ---- contenders -----------------------------------------------------------------------------


TermFunction = Callable[..., Mapping[str, Tensor]]


def k_backwards(
    model: nn.Module,
    embeddings: Sequence[Tensor],
    terms: TermFunction,
    downstream: Callable[..., Tensor],
    weighting: nn.Module,
    *_: Any,
) -> Step:
    """Takes GraP's step without the surrogate, on the backbone's parameters (arXiv 2605.07756, Eq.
    12): one backward pass through the backbone for each loss. The heads get the unweighted terms'
    gradients, as in Alg. 1."""
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
    terms: TermFunction,
    downstream: Callable[..., Tensor],
    weighting: nn.Module,
    *_: Any,
) -> Step:
    """Takes torchjd's step: ``mtl_backward``, one term at a time, and UPGrad of the Jacobians."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    backbone, _heads = _parameters(model)
    losses = list(terms(*embeddings).values())
    downstream(*(each.detach() for each in embeddings)).backward()
    mtl_backward(losses, features=list(embeddings), parallel_chunk_size=1, retain_graph=True)
    jac_to_grad(backbone, UPGrad())
    return _done(torch.ones(len(losses)), Statistics(torch.stack(losses).detach()))


def _parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Lists the trained parameters: those of the backbone, and those of heads and probe."""
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    backbone = [each for name, each in named if name.startswith("backbone.")]
    return backbone, [each for name, each in named if not name.startswith("backbone.")]


def _done(weights: Tensor, found: Statistics) -> Step:
    """Makes a step whose gradients are already set, so that its loss adds none."""
    loss = torch.zeros((), device=found.losses.device, requires_grad=True)
    return Step(loss, {}, loss.detach(), weights, found, loss.detach() == 0)


# ---- the step of a method -------------------------------------------------------------------


def contender(
    name: str, method: str, batch_size: int, accelerator: str, precision: str
) -> Contender:
    """Makes one of :func:`bench_step`'s contenders.

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
    cfg = prepare(compose(find_packaged(f"cifar10/{method}"), changes))
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
    """Times one optimiser step of a method with its CIFAR-10 configuration (ResNet-18, CIFAR stem).

    The contenders: ``fixed`` and ``grap`` are ours; ``grap_compiled`` is ``grap`` with
    ``performance.compile``; ``k_backwards`` and ``torchjd`` take the steps of :func:`k_backwards`
    and :func:`torchjd_step`; ``solo_learn`` is solo-learn's own class, if its main branch is on the
    path.

    Args:
        batch_size: images of a step, two views each.
        rounds: how often each contender is timed, after one warm-up round.
        accelerator: see :func:`contender`.
        precision: see :func:`contender`.
        only: the contenders to time; None times all but ``grap_compiled``, which needs a C++
            compiler.
        method: a method's name without ``grap_``; None takes the first one.

    Returns:
        The settings; ``ratios`` of step times by ``a/b``: see
        :func:`~grap_solo.experiments.timing.ratio`; ``seconds``, the median step; and ``peak_mib``:
        see :func:`~grap_solo.experiments.counting.peak_memory`.

    Raises:
        ConfigError: an unknown method or contender.
    """
    method = method or next(iter(METHODS))
    if method not in METHODS:
        raise unknown_name("--method", method, METHODS)
    names = [name for name in CONTENDERS if name != "solo_learn" or BASE == "solo-learn"]
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


# ---- growth with the number of terms --------------------------------------------------------


def bench_terms(
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32), batch_size: int = 64, rounds: int = 15
) -> dict[str, Any]:
    """Times how a step grows with the number K of terms on one embedding, on the CPU.

    The backbone is a ResNet-18 with the CIFAR stem. Each term has a head of two layers, which
    regresses random targets.

    Args:
        counts: the numbers of terms.
        batch_size: images of a step.
        rounds: see :func:`~grap_solo.experiments.timing.in_turns`.

    Returns:
        The settings, and ``ratios``: by K, the time of a GraP step over one of plain training.
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
        weighting.set_total_steps(1000)  # Any number: the length costs no time.

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
    """Formats ``ratios`` as a Markdown table, and ``seconds`` and ``peak_mib`` as another."""
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
