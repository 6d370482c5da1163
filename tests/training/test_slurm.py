"""Launches on several processes and nodes, on a SLURM cluster that is four small programs."""

import io
import re
import subprocess
import sys
from contextlib import redirect_stderr

import pytest
import yaml
from cluster import asked_of_sbatch, clusters, how_jobs_ended, logs
from helpers import ROOT, SMALL

from grap_solo.cli import main
from grap_solo.records.weights import read_weights

SCRIPT = ROOT / "scripts" / "torchrun.sbatch"
FLAGS = ["--config-path", "configs/digits", "--config-name", "grap"]
# Of two processes each has half of the 64 images of a step: three steps, as with one.
HALVES = ["+data.fraction=0.2", "max_epochs=1", "scheduler.warmup_epochs=0"]
HALVES += ["optimizer.batch_size=32", "name=halves"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="SLURM's scripts are bash"),
]


@pytest.fixture(scope="module")
def on_a_cluster(tmp_path_factory):
    yield from clusters(tmp_path_factory)


@pytest.fixture(scope="module")
def array(on_a_cluster):
    """A sweep of two runs as one array: the first one's time runs out, the second one is refused.

    Returns:
        Where it was started, the exit code, and what was printed on stderr.
    """
    root = on_a_cluster(SIGNAL_AT="runs/sweep-grap-digits/rate2-sum-seed5/checkpoints/"
                        "rate2-sum-seed5-ep0.ckpt")  # fmt: skip
    sweep = ["--config-dir", "configs", "+sweeps/multirun=grap", "+slurm/launch=submitit"]
    sweep += ["weighting.lr_per_run=2,0", "weighting.normalization=sum", "seed=5"]
    # So short a time that submitit takes every signal for the end of it.
    sweep += [*SMALL, "max_epochs=3", "hydra.launcher.timeout_min=1"]
    with redirect_stderr(io.StringIO()) as errors:
        code = main(["pretrain", *FLAGS, *sweep])
    return root, code, errors.getvalue()


@pytest.fixture(scope="module")
def two_tasks(on_a_cluster):
    """The run of two processes that SLURM has started, as submitit asked it to."""
    root = on_a_cluster()
    flags = [*FLAGS, "--config-dir", "configs/slurm", "+launch=submitit", "devices=2"]
    assert main(["pretrain", *flags, *HALVES]) == 0, logs(root)
    return root / "runs" / "halves"


def test_a_submission_asks_for_a_process_for_each_gpu(on_a_cluster, capfd):
    root = on_a_cluster(SBATCH_REFUSES="invalid partition specified")
    flags = ["--config-path", "configs/cifar10", "--config-name", "grap"]
    flags += ["--config-dir", "configs/slurm", "+launch=submitit", "num_nodes=2", "devices=4"]
    assert main(["pretrain", *flags, "hydra.launcher.partition=gpu"]) == 2
    error = capfd.readouterr().err
    assert re.search(r"grap-solo: hydra.launcher: .*invalid partition specified", error)
    assert "Traceback" not in error
    script = root / "cluster" / "submission.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    asked = asked_of_sbatch(script.read_text())
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "4", "4")
    assert asked["cpus-per-task"] == "8" and asked["time"] == "1440"
    assert asked["partition"] == "gpu" and asked["signal"] == "USR2@120" and "requeue" in asked
    assert "gpus-per-task" not in asked and asked["job-name"] == "grap-solo"
    assert asked["output"].startswith(f"{root}/runs/.submitit/")
    assert re.search(r"^srun .* -m submitit.core._submit ", script.read_text(), re.MULTILINE)


@pytest.mark.slow
def test_a_sweep_is_an_array_of_jobs(array):
    root, *_ = array
    asked = asked_of_sbatch((root / "cluster" / "submission.sh").read_text())
    assert asked["array"] == "0-1%2" and asked["nodes"] == asked["ntasks-per-node"] == "1"
    assert how_jobs_ended(root, 2) == ["COMPLETED", "COMPLETED"]
    sweep = root / "runs" / "sweep-grap-digits"
    assert {path.name for path in sweep.iterdir()} == {
        "rate2-sum-seed5", "multirun.yaml", ".submitit",
    }  # fmt: skip


@pytest.mark.slow
def test_a_job_whose_time_is_over_is_requeued_and_goes_on(array):
    root, *_ = array
    (requeued,) = (root / "cluster").glob("requeued-*")
    assert requeued.name.endswith("_0.done")
    run = root / "runs" / "sweep-grap-digits" / "rate2-sum-seed5"
    _, steps, _ = read_weights(run / "weights.csv")
    assert steps[:, 0].tolist() == list(range(1, 10))
    assert (run / "trained.json").exists()
    (log,) = (text for name, text in logs(root).items() if name.endswith("_0_0_log.out"))
    first, second = re.findall(r"^rate2-sum-seed5: grap_all4one.*", log, re.MULTILINE)
    assert "resuming" not in first and re.search(r"resuming after epoch [01]$", second)


@pytest.mark.slow
def test_a_job_that_is_refused_is_reported_where_it_was_submitted(array):
    root, code, errors = array
    assert code == 2 and "Traceback" not in errors
    line = "grap-solo: weighting.lr_per_run: expected a number above 0, got 0"
    job, message = errors.strip().splitlines()[-2:]
    assert "weighting.lr_per_run=0'" in job and message == line
    (log,) = (text for name, text in logs(root).items() if name.endswith("_1_0_log.err"))
    assert line in log.splitlines()


@pytest.mark.slow
def test_slurms_two_processes_are_one_training(two_tasks):
    _, steps, weights = read_weights(two_tasks / "weights.csv")
    assert steps[:, 0].tolist() == [1, 2, 3]
    assert (weights[-1] != weights[0]).any()
    config = yaml.safe_load((two_tasks / "config.yaml").read_text())
    assert (config["devices"], config["num_nodes"]) == (2, 1)


@pytest.mark.slow
def test_the_batch_script_trains_on_two_nodes_by_torchrun(on_a_cluster, two_tasks):
    """As SLURM's own two processes do, to the bit."""
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    root = on_a_cluster()
    script = root / "torchrun.sbatch"
    script.write_text(SCRIPT.read_text().replace("--gpus-per-node=4", "--gpus-per-node=1"))
    submitted = subprocess.run(["sbatch", script, *FLAGS, *HALVES])
    assert submitted.returncode == 0
    log = root / "cluster" / "jobs.log"
    assert how_jobs_ended(root) == ["COMPLETED"], log.read_text()[-3000:]
    run = root / "runs" / "halves"
    assert (run / "weights.csv").read_bytes() == (two_tasks / "weights.csv").read_bytes()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["devices"], config["num_nodes"]) == (1, 2)
