"""Two processes give the statistics, weights and gradients of one on the joined batch, and All4One
trains in two."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import in_two_processes, quiet_digits, rows_of, same_in_both
from torch.multiprocessing import ProcessExitedException
from torch.nn import functional as F

from grap_solo import balance, build_weighting
from grap_solo.balance import HeldOut, SharedHead
from grap_solo.data import evaluation_loader, load_images
from grap_solo.data.sampling import ShareSampler
from grap_solo.evaluation.moments import EmbeddingMoments
from grap_solo.methods import GrapAll4One
from grap_solo.training.run import pretrain
from grap_solo.weighting import WEIGHTINGS

RULES = {
    "grap": {"name": "grap", "recipe": "alg1", "scale": "unit"},
    "grap_held_out": {"name": "grap"},
    "grap_ema": {"name": "grap", "recipe": "alg1", "ema": 0.5},
    "grap_paper": {"name": "grap", "recipe": "paper", "average_first": 2, "ema": 0.5},
    "grap_aligned_mtl": {"name": "grap", "shared_heads": "aligned_mtl", "regularization": 1.0},
    "gradnorm": {"name": "gradnorm"},
    "dwa": {"name": "dwa"},
    "mgda": {"name": "mgda"},
    "pcgrad": {"name": "pcgrad"},
    "famo": {"name": "famo"},
    "random": {"name": "random", "seed": 3},
    "uncertainty": {"name": "uncertainty"},
    "auxiliary": {"name": "auxiliary", "scale": "reference"},
}


def test_every_rule_that_learns_or_draws_is_compared_in_two_processes():
    """The others are functions of one step's Gramian, as pcgrad and mgda are, or of its number."""
    constant = {"fixed", "equal", "supervised", "scheduled"}
    gramian = {name for name, rule in WEIGHTINGS.items() if rule.uses_gradients}
    gramian -= {"grap", "gradnorm"}
    tried = {each["name"] for each in RULES.values()}
    assert tried >= set(WEIGHTINGS) - constant - gramian and tried & gramian


def problem():
    torch.manual_seed(0)
    backbone, head, probe = (torch.nn.Linear(6, 5), torch.nn.Linear(5, 4), torch.nn.Linear(5, 3))
    for module in (backbone, head, probe):
        module.double()
    images, labels = torch.randn(2, 8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    return backbone, head, probe, images, labels


def steps(part, rule, count=4):
    """A few steps with unchanged networks on a part of the batch: the weights of each, and the
    last step's gradients by backbone and head."""
    backbone, head, probe, (images, others), labels = problem()
    images, others, labels = images[part], others[part], labels[part]
    weighting = build_weighting(RULES[rule], ["a", "b"], {"a": 0.5, "b": 2.0}).double()
    weighting.set_total_steps(50)

    shared = SharedHead(["a", "b"], head.parameters()) if rule == "grap_aligned_mtl" else None

    def terms(z):
        if shared is not None:
            out = head(z)
            return {
                "a": shared(out, "a").square().mean(),
                "b": torch.tanh(shared(out, "b") - 1).mean(),
            }
        return {"a": head(z).square().mean(), "b": torch.tanh(z).mean() + 2}

    weights = []
    for number in range(count):
        for module in (backbone, head):
            module.zero_grad()
        held_out = None
        if rule == "grap_held_out":
            held_out = HeldOut([backbone(others).detach()], terms)
        step = balance(
            backbone(images + number),
            terms,
            lambda z: F.cross_entropy(probe(z), labels),
            weighting,
            shared,
            held_out,
        )
        step.loss.backward()
        weights.append(step.weights.double())
        weighting.end_epoch()
        if weighting.needs_losses_after:
            with torch.no_grad():
                after = torch.stack(list(terms(0.9 * backbone(images + number)).values()))
            if dist.is_initialized():
                dist.all_reduce(after)
                after /= 2
            weighting.after_step(after)
    return torch.stack(weights), torch.cat([backbone.weight.grad.T, head.weight.grad], dim=0)


def process(path):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {}
    for rule in RULES:
        weights, gradient = steps(slice(4 * rank, 4 * rank + 4), rule)
        dist.all_reduce(gradient)  # As DDP averages.
        found[rule] = (weights, gradient / 2)
    found["numbers"], found["finite"] = traffic(rank)
    found["moments"] = moments(slice(None, 7) if rank == 0 else slice(7, None))
    torch.save(found, f"{path}/{rank}.pt")
    dist.destroy_process_group()


def moments(part):
    """RankMe and the spread of 11 embeddings, of which this process has a part."""
    embeddings = torch.randn(11, 16, generator=torch.Generator().manual_seed(0))
    found = EmbeddingMoments()
    found.update(embeddings[part])
    return found.compute()


def traffic(rank):
    """How many numbers each all-reduce of a GraP step shares; and whether it is finite when a
    loss, a gradient or the probe of the second process is not."""
    backbone, head, probe, images, labels = problem()
    numbers, original = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        numbers.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce, finite = counted, {}
    for case in ("nothing", "loss", "gradient", "probe"):
        bad = {case} if rank == 1 else set()

        def terms(z, bad=bad):
            a, b = head(z).square().mean(), (torch.tanh(z) ** 2).mean()
            if "gradient" in bad:
                b = b + (0 * z).sum().sqrt()
            return {"a": a * torch.inf if "loss" in bad else a, "b": b}

        def downstream(z, bad=bad):
            loss = F.cross_entropy(probe(z), labels)
            return loss * torch.nan if "probe" in bad else loss

        for rule in ("grap", "fixed"):
            weighting = build_weighting({"name": rule}, ["a", "b"]).double()
            weighting.set_total_steps(4)
            step = balance(backbone(images[0]), terms, downstream, weighting)
            finite[f"{rule} {case}"] = bool(step.finite)
    dist.all_reduce = original
    return numbers[:2], finite


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    in_two_processes(process, str(path))
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("rule", RULES)
def test_two_processes_equal_one_on_the_joined_batch(rule, both):
    weights, gradient = steps(slice(None), rule)
    for found in both:
        torch.testing.assert_close(found[rule][0], weights, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[rule][1], gradient, rtol=1e-6, atol=1e-9)
    constant = rule in ("auxiliary", "uncertainty")
    assert (
        torch.allclose(weights[0] / weights[0].sum(), weights[-1] / weights[-1].sum()) == constant
    )


def test_a_step_shares_one_small_all_reduce(both):
    """K*K + K numbers, the downstream norm, and whether all is finite; without gradients that."""
    assert [found["numbers"] for found in both] == [[2 * 2 + 2 + 2, 1]] * 2


def test_rank_and_spread_are_those_of_both_processes_embeddings(both):
    """Unequal parts, of fewer embeddings together than dimensions."""
    expected = moments(slice(None))
    for found in both:
        assert found["moments"] == pytest.approx(expected, rel=1e-9)
        assert found["moments"] != pytest.approx(moments(slice(None, 7)), rel=0.1)


def test_what_is_not_finite_in_one_process_is_known_to_both(both):
    expected = {
        f"{rule} {case}": case == "nothing" or (rule, case) == ("fixed", "gradient")
        for case in ("nothing", "loss", "gradient", "probe")
        for rule in ("grap", "fixed")
    }
    assert both[0]["finite"] == both[1]["finite"] == expected


def configuration(directory):
    overrides = ["devices=2", "+strategy=ddp", "optimizer.batch_size=31"]
    overrides += ["weighting.lr=null", "+weighting.lr_per_run=0.8"]  # 8 steps: 0.1 a step.
    return quiet_digits(directory, *overrides)


def train(directory, stop=None):
    """One process's part of a training. It writes what it has seen into ``directory/RANK.json``.

    Args:
        directory: of the run, and of that file.
        stop: what ends it in the second epoch: ``exit``, as if each process had died, or
            ``terminate``, a SIGTERM to torchrun.
    """
    gathered, step, finish = [], GrapAll4One.training_step, GrapAll4One.finish_step

    def watched(self, batch, batch_idx):
        if stop and self.current_epoch == 1:
            if stop == "exit":
                os._exit(9)
            if batch_idx == 0 and dist.get_rank() == 0:
                time.sleep(1)  # The other process waits for this one's share of its step.
                os.kill(os.getppid(), signal.SIGTERM)  # torchrun, which sends it to all.
                time.sleep(1)
        if dist.get_rank() == 1:
            batch[2].fill_(-1)
        return step(self, batch, batch_idx)

    def finished(self, taken):
        before, batch = int(self.queue_ptr), taken.batch
        finish(self, taken)
        slots = (before + torch.arange(2 * len(batch[0]))) % len(self.queue)
        images = self.queue_index[slots].tolist(), batch[0].tolist()
        labels = self.queue_y[slots].tolist(), batch[2].tolist()
        gathered.append((*images, *labels))

    def one_fewer(self, size):
        self.size = size - 1

    # Each process lives for this one training: what is changed need not be changed back.
    GrapAll4One.training_step, GrapAll4One.finish_step = watched, finished
    ShareSampler.__init__ = one_fewer  # An odd number of validation images.
    run = pretrain(configuration(directory))
    model, hits = run.model, torch.zeros(2)
    tensors = [*model.parameters(), model.queue, model.queue_y, model.queue_ptr]
    with torch.no_grad():
        for images, labels in evaluation_loader(run.cfg, load_images(run.cfg.data, train=False)):
            found = model.classifier(model.backbone(images)).argmax(1)
            hits += torch.tensor([(found == labels).sum(), len(labels)])
    share = hits[1].item()
    dist.all_reduce(hits)
    seen = {
        "lr": model.weighting.lr,
        "same": same_in_both([*tensors, *model.weighting.state_dict().values()]),
        "gathered": gathered,
        "accuracy": run.accuracy,
        "share": share,
        "expected": (100 * hits[0] / hits[1]).item(),
    }
    Path(directory, f"{dist.get_rank()}.json").write_text(json.dumps(seen))


def train_by_torchrun(directory):
    """The training that torchrun starts, and that ends by a SIGTERM to it."""
    script = directory / "script.py"
    script.write_text("import sys, test_distributed; test_distributed.train(*sys.argv[1:])")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", str(30500 + os.getpid() % 1000), script, directory, "terminate"],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    in_two_processes(train, str(directory))
    return directory


def test_all4one_trains_for_two_epochs_in_two_processes(trained):
    """Images that do not share out evenly, and one process without any label."""
    ranks = [json.loads((trained / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["same"] and ranks[1]["same"]
    # Each step both processes' images go into both queues, the first one's first, as solo-learn's.
    steps = list(zip(ranks[0]["gathered"], ranks[1]["gathered"], strict=True))
    assert len(steps) == 2 * (251 // 2 // 31)
    assert [rank["lr"] for rank in ranks] == [0.8 / len(steps)] * 2
    for first, second in steps:
        assert first[0] == second[0] == first[1] + second[1]
        assert first[2] == second[2] == first[3] + second[3] and set(second[3]) == {-1}
    # The validation images, an odd number, are counted once each.
    assert [rank["share"] for rank in ranks] == [270, 269]
    for rank in ranks:
        assert rank["accuracy"] == pytest.approx(rank["expected"], abs=1e-3)
    rows = rows_of(trained / "run" / "diagnostics.csv")
    assert len(rows) == len(steps) and {row["skipped"] for row in rows} == {""}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exit", "terminate"])
def test_two_processes_that_were_stopped_go_on_to_the_same_end(how, trained, tmp_path):
    """They die, or torchrun gets SIGTERM: they end after the same step, none waits for ever."""
    interrupted = tmp_path / "run" / "checkpoints" / "run-interrupted.ckpt"
    if how == "exit":
        with pytest.raises(ProcessExitedException, match="exit code 9"):
            in_two_processes(train, str(tmp_path), how)
        assert not interrupted.exists()
    else:
        stopped = train_by_torchrun(tmp_path)
        assert stopped.returncode != 0
        (steps,) = re.findall(r"^run: stopped after step (\d+): start it", stopped.stderr, re.M)
        assert torch.load(interrupted, weights_only=True)["global_step"] == int(steps) < 8
    assert not (tmp_path / "run" / "trained.json").exists()
    in_two_processes(train, str(tmp_path))
    # Resumed after the first epoch: of the second epoch's four steps none is missing, none is more.
    assert len(json.loads((tmp_path / "0.json").read_text())["gathered"]) == 4
    assert not interrupted.exists()
    for name in ("weights.csv", "diagnostics.csv", "metrics.csv", "median_weights.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / "run" / name).read_bytes()
