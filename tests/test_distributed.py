"""Two processes give the statistics, weights and gradients of one on the joined batch, and All4One
trains in two."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from grap_solo import balance, build_weighting
from grap_solo.balance import HeldOut

RULES = {
    "grap": {"name": "grap", "scale": "unit"},
    "grap_held_out": {"name": "grap"},
    "grap_ema": {"name": "grap", "ema": 0.5},
    "gradnorm": {"name": "gradnorm"},
    "dwa": {"name": "dwa"},
    "mgda": {"name": "mgda"},
    "pcgrad": {"name": "pcgrad"},
    "famo": {"name": "famo"},
    "random": {"name": "random", "seed": 3},
    "uncertainty": {"name": "uncertainty"},
    "auxiliary": {"name": "auxiliary", "scale": "reference"},
}


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

    def terms(z):
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
            held_out=held_out,
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


def process(rank, path, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for rule in RULES:
        weights, gradient = steps(slice(4 * rank, 4 * rank + 4), rule)
        dist.all_reduce(gradient)  # As DDP averages.
        found[rule] = (weights, gradient / 2)
    found["numbers"], found["finite"] = traffic(rank)
    torch.save(found, f"{path}/{rank}.pt")
    dist.destroy_process_group()


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
            step = balance(backbone(images[0]), terms, downstream, weighting)
            finite[f"{rule} {case}"] = bool(step.finite)
    dist.all_reduce = original
    return numbers[:2], finite


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(process, (str(path), 29500 + os.getpid() % 1000), nprocs=2)
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


def test_what_is_not_finite_in_one_process_is_known_to_both(both):
    expected = {
        f"{rule} {case}": case == "nothing" or (rule, case) == ("fixed", "gradient")
        for case in ("nothing", "loss", "gradient", "probe")
        for rule in ("grap", "fixed")
    }
    assert both[0]["finite"] == both[1]["finite"] == expected


SCRIPT = """
import json, os, signal, sys, time
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from grap_solo.data import evaluation_loader, load_images
from grap_solo.data.sampling import ShareSampler
from grap_solo.methods import GrapAll4One
from grap_solo.training.run import pretrain

configs, directory, *overrides = sys.argv[1:]
with initialize_config_dir(configs, version_base="1.2"):
    cfg = compose("grap", overrides)
gathered, step = [], GrapAll4One.training_step

def watched(self, batch, batch_idx):
    if "STOP" in os.environ and self.current_epoch == 1:
        if os.environ["STOP"] == "exit":
            os._exit(9)
        if batch_idx == 0 and dist.get_rank() == 0:
            time.sleep(1)  # The other one waits for this one's share of its step.
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun, which sends it to all.
            time.sleep(1)
    if dist.get_rank() == 1:
        batch[2].fill_(-1)
    before = int(self.queue_ptr)
    loss = step(self, batch, batch_idx)
    slots = (before + torch.arange(2 * len(batch[0]))) % len(self.queue)
    gathered.append((self.queue_index[slots].tolist(), batch[0].tolist(),
                     self.queue_y[slots].tolist(), batch[2].tolist()))
    return loss

GrapAll4One.training_step = watched
ShareSampler.__init__ = lambda self, size: setattr(self, "size", size - 1)  # An odd number.
run = pretrain(cfg)
rank, model = dist.get_rank(), run.model
same = []
for value in [*model.parameters(), model.queue, model.queue_y, model.queue_ptr,
              *model.weighting.state_dict().values()]:
    parts = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(parts, value.detach().contiguous())
    same.append(torch.equal(*parts))
hits = torch.zeros(2)
with torch.no_grad():
    for images, labels in evaluation_loader(run.cfg, load_images(run.cfg.data, train=False)):
        found = model.classifier(model.backbone(images)).argmax(1)
        hits += torch.tensor([(found == labels).sum(), len(labels)])
share = hits[1].item()
dist.all_reduce(hits)
json.dump({"same": all(same), "gathered": gathered, "accuracy": run.accuracy, "share": share,
           "expected": (100 * hits[0] / hits[1]).item()},
          open(f"{directory}/{rank}.json", "w"))
"""


def start_script(directory, **environment):
    script = directory / "script.py"
    script.write_text(SCRIPT)
    digits = Path(__file__).parents[1] / "configs" / "digits"
    overrides = ["+data.fraction=0.2", "max_epochs=2", "scheduler.warmup_epochs=1", "devices=2"]
    overrides += ["+strategy=ddp", "optimizer.batch_size=31", f"checkpoint.dir={directory}"]
    overrides += ["+enable_progress_bar=false", "log_every_n_steps=1", "name=run"]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", str(30500 + os.getpid() % 1000), script, digits, directory, *overrides],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    done = start_script(directory)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return directory


def test_all4one_trains_for_two_epochs_in_two_processes(trained):
    """Images that do not share out evenly, and one process without any label."""
    ranks = [json.loads((trained / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["same"] and ranks[1]["same"]
    # Each step both processes' images go into both queues, the first one's first, as solo-learn's.
    steps = list(zip(ranks[0]["gathered"], ranks[1]["gathered"], strict=True))
    assert len(steps) == 2 * (251 // 2 // 31)
    for first, second in steps:
        assert first[0] == second[0] == first[1] + second[1]
        assert first[2] == second[2] == first[3] + second[3] and set(second[3]) == {-1}
    # The validation images, an odd number, are counted once each.
    assert [rank["share"] for rank in ranks] == [270, 269]
    for rank in ranks:
        assert rank["accuracy"] == pytest.approx(rank["expected"], abs=1e-3)
    rows = list(csv.DictReader((trained / "run" / "diagnostics.csv").open()))
    assert len(rows) == len(steps) and {row["skipped"] for row in rows} == {""}


@pytest.mark.parametrize("how", ["exit", "terminate"])
def test_two_processes_that_were_stopped_go_on_to_the_same_end(how, trained, tmp_path):
    """They die, or torchrun gets SIGTERM: they end after the same step, none waits for ever."""
    stopped = start_script(tmp_path, STOP=how)
    assert stopped.returncode != 0 and not (tmp_path / "run" / "trained.json").exists()
    interrupted = tmp_path / "run" / "checkpoints" / "run-interrupted.ckpt"
    if how == "terminate":
        (steps,) = re.findall(r"^run: stopped after step (\d+): start it", stopped.stderr, re.M)
        assert torch.load(interrupted, weights_only=True)["global_step"] == int(steps) < 8
    done = start_script(tmp_path)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "resuming after epoch 0" in done.stdout and not interrupted.exists()
    for name in ("weights.csv", "diagnostics.csv", "metrics.csv", "median_weights.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / "run" / name).read_bytes()
