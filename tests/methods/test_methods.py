"""Every composite method: its step, its labels, its terms, two processes, its name."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import (
    DIGITS,
    METHOD_KWARGS,
    OWN,
    ROOT,
    SMALL,
    image_batch,
    in_two_processes,
    method_config,
    method_digits,
    method_over,
    take_step,
)
from omegaconf import OmegaConf

from grap_solo import ConfigError
from grap_solo.compose import compose
from grap_solo.experiments.grid import plan
from grap_solo.methods import (
    METHODS,
    CompositeMethod,
    Key,
    find_method,
    takes_weighting,
    weighted_name,
)
from grap_solo.methods.losses import (
    barlow_twins_losses,
    covariance,
    normalized_covariance,
    probe_loss,
    standardize,
    variance,
)
from grap_solo.methods.modules import frozen_statistics
from grap_solo.solo import BaseMomentumMethod
from grap_solo.solo.vibcreg import IterNorm
from grap_solo.training.config import prepare
from grap_solo.weighting import WEIGHTINGS

NAMES = [*METHODS, OWN]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def build(name, **changes):
    """A float64 method without dropout, on a small backbone and 32x32 images."""
    base = {"backbone": {"name": "test_resnet"}, "weighting": {"name": "grap"}}
    cfg = OmegaConf.merge(method_config(name, **base), OmegaConf.create(changes))
    torch.manual_seed(0)
    model = find_method(name)(cfg).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    model.log = model.log_dict = lambda *args, **kwargs: None
    model.weighting.set_total_steps(8)  # There is no trainer that knows it.
    return model


def doubled(seed=0, batch=8):
    index, views, labels = image_batch(seed=seed, batch=batch)
    return [index, [view.double() for view in views], labels]


def outputs_of(model, views):
    """Both views' embeddings and momentum outputs, as ``make_targets`` takes them."""
    outputs = {"feats": [model.multicrop_forward(each)["feats"] for each in views]}
    if hasattr(model, "momentum_forward"):
        momentum = [model.momentum_forward(each) for each in views]
        outputs |= {f"momentum_{key}": [each[key] for each in momentum] for key in momentum[0]}
    return outputs


# ---- one step -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "shared_heads"),
    [("alg1", "sum"), ("alg1", "weights"), ("alg1", "aligned_mtl"), (None, "sum")],
)
@pytest.mark.parametrize("separate", [False, True], ids=["one_projector", "separate"])
@pytest.mark.parametrize("name", NAMES)
def test_a_grap_step_is_that_of_the_real_terms(name, separate, recipe, shared_heads):
    """Alg. 1's, whose heads get the unweighted terms, and the default's, which are weighted."""
    block = {"name": "grap", "recipe": recipe, "shared_heads": shared_heads}
    model = build(name, method_kwargs={"separate_projectors": separate}, weighting=block)
    for seed in range(2):
        take_step(model, doubled(seed))
    terms = model.weighting.terms
    model.weighting.weights.copy_(torch.linspace(0.5, 2.0, len(terms)))
    batch = doubled(9)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.zero_grad()
    take_step(model, batch)
    actual = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    weights = dict(zip(terms, model.effective_weights))
    model.load_state_dict(state)

    # The same by one ordinary backward per term through the undetached embeddings.
    model.shared = None
    outputs = outputs_of(model, batch[1])
    with torch.no_grad():
        targets = model.make_targets(outputs)
    losses = model.compute_terms(model._project(outputs["feats"]), targets)
    assert list(losses) == list(terms)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    by_term = {}
    for term in terms:
        found = torch.autograd.grad(
            losses[term], list(trained.values()), retain_graph=True, allow_unused=True
        )
        by_term[term] = {n: g for n, g in zip(trained, found) if g is not None}
    probe = [probe_loss(model.classifier(each.detach()), batch[2]) for each in outputs["feats"]]
    by_probe = torch.autograd.grad(sum(probe) / 2, model.classifier.weight)[0]
    torch.testing.assert_close(actual.pop("classifier.weight"), by_probe)
    assert len(actual) > 20
    plain = weights if recipe is None else dict.fromkeys(terms, 1.0)
    shared = {"sum": plain, "weights": weights}.get(shared_heads)
    if (
        shared is None and not separate
    ):  # sigma_min U S^-1 U^T 1, of the matrix U S V^T of the projector's gradients.
        rows = [[g.flatten() for n, g in by_term[t].items() if "projector." in n] for t in terms]
        left, sizes, _ = torch.linalg.svd(torch.stack([torch.cat(row) for row in rows]), False)
        shared = dict(zip(terms, sizes.min() * (left / sizes @ left.T).sum(1)))
    for key, gradient in actual.items():
        if key.startswith("classifier"):
            continue
        factors = plain
        if key.startswith("backbone"):
            factors = weights
        elif key.startswith("projector.") and not separate:
            factors = shared
        expected = sum(factors[t] * found[key] for t, found in by_term.items() if key in found)
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_labels_cannot_reach_the_backbone_when_the_weights_are_held(name):
    model = build(name, weighting={"name": "grap", "warmup_epochs": 1})
    index, views, labels = doubled(3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = []
    for each in (labels, labels[torch.randperm(8)]):
        model.load_state_dict(state)
        model.zero_grad()
        model.training_step([index, views, each], 0).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    before, after = gradients
    for key in before:
        assert torch.equal(before[key], after[key]) == (not key.startswith("classifier")), key


@pytest.mark.parametrize("rule", WEIGHTINGS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "all4one"])
def test_every_rule_trains_every_method(name, rule):
    """All4One with every rule is in test_variants, as whole runs."""
    model = build(name, weighting={"name": rule})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for seed in range(3):
        optimizer.zero_grad()
        loss = take_step(model, doubled(seed))
        optimizer.step()
        model.update_weighting_after_step()
        assert loss.isfinite() and model.effective_weights.isfinite().all()
    moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved >= {"backbone", "classifier"}
    assert ("projector" in moved) == bool(model.weighting.active)


@pytest.mark.parametrize("name", NAMES)
def test_a_term_of_weight_0_is_not_computed(name):
    terms = build(name).weighting.terms
    weights = {term: float(k != len(terms) - 1) for k, term in enumerate(terms)}
    model = build(name, weighting={"name": "fixed", "weights": weights})
    outputs = outputs_of(model, doubled()[1])
    losses = model.compute_terms(model._project(outputs["feats"]), model.make_targets(outputs))
    assert list(losses) == list(terms[:-1])


def test_a_held_out_batch_leaves_no_trace_in_running_statistics():
    """Iterative normalisation's included, and whichever the held-out images are."""
    found = []
    for seed in (None, 1, 2):
        model = build("vibcreg")
        batch = doubled(0)
        model.training_step(
            batch if seed is None else {"train": batch, "labelled": doubled(seed)}, 0
        )
        found.append({k: v for k, v in model.named_buffers() if "running" in k})
    start = dict(build("vibcreg").named_buffers())
    assert any(key.startswith("projector.7") for key in found[0])
    for key, value in found[0].items():
        assert not torch.equal(value, start[key]), key
        assert torch.equal(value, found[1][key]) and torch.equal(value, found[2][key]), key


def test_a_layer_with_statistics_of_its_own_kind_is_left_alone():
    layer = torch.nn.Linear(2, 2)
    layer.register_buffer("running_mean", torch.zeros(2))
    with frozen_statistics(layer):
        assert not hasattr(layer, "momentum")


class Momentum(CompositeMethod, BaseMomentumMethod):
    """A method of one's own with a momentum network, a shared head, and no projector."""

    @staticmethod
    def reference_weights(cfg):
        return {"a": 1.0, "b": 2.0, "c": 0.5}

    def build_networks(self):
        self.both, self.own = (torch.nn.Linear(self.features_dim, 4) for _ in range(2))

    def heads(self):
        return {"a": [self.both], "b": [self.both], "c": [self.own]}

    def make_targets(self, outputs):
        return [each[:, :4] for each in outputs["momentum_feats"]]

    def compute_terms(self, projections, targets):
        heads = {"a": self.both, "b": self.both, "c": self.own}
        return {
            term: sum((heads[term](z) - t).square().mean() for z, t in zip(views, targets))
            for term, views in projections.items()
        }


def own(**changes):
    base = {"backbone": {"name": "test_resnet"}, "weighting": {"name": "grap"}}
    cfg = OmegaConf.merge(method_config("test_methods:Momentum", **base), OmegaConf.create(changes))
    model = Momentum(cfg)
    model.weighting.set_total_steps(8)
    model.log = model.log_dict = lambda *args, **kwargs: None
    return model


def trained(model):
    return {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}


def test_a_method_of_ones_own_may_have_a_momentum_network_and_shared_heads():
    model = own()
    model.training_step(image_batch(), 0).backward()
    assert trained(model) == {"backbone", "classifier", "both", "own"}
    known = {id(p) for group in model.learnable_params for p in group["params"]}
    assert all(id(p) in known for p in model.both.parameters())
    assert (model.backbone, model.momentum_backbone) in model.momentum_pairs

    weights = {"name": "fixed", "weights": {"a": 0, "b": 1, "c": 0}}
    assert trained(own(weighting=weights)) == {"backbone", "classifier", "both"}
    supervised = own(weighting={"name": "supervised"})
    assert supervised.training_step(image_batch(), 0).isfinite()
    assert trained(supervised) == {"backbone", "classifier"}
    with pytest.raises(ConfigError, match="separate_projectors: .*has no projector"):
        own(method_kwargs={"separate_projectors": True})


def test_weights_recorded_before_the_first_usable_step_are_on_the_models_device():
    """A model is built on the CPU and moved; its first step may be skipped, as in float16."""
    model = build("vicreg").to("meta")
    model.trainer = SimpleNamespace(
        global_step=0, max_epochs=2, num_training_batches=3, accumulate_grad_batches=1,
        estimated_stepping_batches=6,
    )  # fmt: skip
    model.on_train_start()
    assert model.effective_weights.device.type == "meta"


# ---- the terms, written out ---------------------------------------------------------------------


def test_vicregs_terms_sample_by_sample():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(12, 5, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 2, 5)
    mean = [sum(z[n, j] for n in range(12)) / 12 for j in range(5)]
    cov = [
        [sum((z[n, i] - mean[i]) * (z[n, j] - mean[j]) for n in range(12)) / 11 for j in range(5)]
        for i in range(5)
    ]
    hinge = sum(max(0, 1 - (cov[j][j] + 1e-4) ** 0.5) for j in range(5)) / 5
    assert 0 < hinge.item() == pytest.approx(variance(z).item())
    off = [(i, j) for i in range(5) for j in range(5) if i != j]
    assert covariance(z).item() == pytest.approx(sum(cov[i][j] ** 2 for i, j in off).item() / 5)
    squares = sum(cov[i][j] ** 2 / (cov[i][i] * cov[j][j]) for i, j in off)
    assert normalized_covariance(z).item() == pytest.approx(squares.item() / 25)


def test_barlow_twins_terms_sample_by_sample():
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(12, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    standard = [(v - v.mean(0)) / (v.var(0, unbiased=False) + 1e-5).sqrt() for v in views]
    on = off = 0.0
    for i in range(4):
        for j in range(4):
            c = sum(standard[0][n, i] * standard[1][n, j] for n in range(12)).item() / 12
            on += (c - 1) ** 2 * (i == j)
            off += c**2 * (i != j)
    found = barlow_twins_losses(*(standardize(v) for v in views))
    assert [each.item() for each in found] == pytest.approx([on, off])


def test_iterative_normalisation_whitens_each_group():
    torch.manual_seed(0)
    layer = IterNorm(6, groups=2, iterations=9).double()
    mixed = torch.randn(400, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    white = layer(mixed)
    groups = (white - white.mean(0)).T.reshape(2, 3, 400)
    eye = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    torch.testing.assert_close(groups @ groups.mT / 400, eye, atol=1e-3, rtol=0)
    layer.momentum = 1.0
    layer(mixed)
    torch.testing.assert_close(layer.eval()(mixed), white)


# ---- two processes ------------------------------------------------------------------------------


def on_a_part(name, part):
    """The terms and their gradients by the projections, of a part of 16 samples, with the networks'
    batch statistics held."""
    model = build(name).eval()
    generator = torch.Generator().manual_seed(3)
    size = model.projector[-1].num_features if name == "all4one" else len(model.projector[6].bias)
    views = [torch.randn(16, size, generator=generator, dtype=torch.float64) for _ in range(2)]
    momentum = [torch.randn(16, size, generator=generator, dtype=torch.float64) for _ in range(2)]
    views = [view[part].clone().requires_grad_() for view in views]
    momentum = [torch.nn.functional.normalize(each[part], dim=-1) for each in momentum]
    targets = model.make_targets({"momentum_z": momentum, "momentum_feats": []})
    losses = model.compute_terms(dict.fromkeys(model.weighting.terms, views), targets)
    gradients = {
        term: torch.cat(torch.autograd.grad(loss, views, retain_graph=True), dim=1)
        for term, loss in losses.items()
    }
    return {term: loss.detach() for term, loss in losses.items()}, gradients


def process(path):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {name: on_a_part(name, slice(8 * rank, 8 * rank + 8)) for name in NAMES}
    torch.save(found, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    in_two_processes(process, str(path))
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


LOCAL = ("byol", "barlow", "feature")
"""All4One's correlation terms, which solo-learn takes within each process."""


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one_on_the_joined_batch(name, both):
    """The loss is the mean of the processes', and so is the gradient, as DDP averages it."""
    losses, gradients = on_a_part(name, slice(None))
    halves = [on_a_part(name, slice(8 * rank, 8 * rank + 8)) for rank in (0, 1)]
    compared = 0
    for term in losses:
        loss = sum(found[name][0][term] for found in both) / 2
        gradient = torch.cat([found[name][1][term] for found in both]) / 2
        if term in LOCAL and name == "all4one":
            expected = sum(half[0][term] for half in halves) / 2
            expected_gradient = torch.cat([half[1][term] for half in halves]) / 2
        else:
            expected, expected_gradient = losses[term], gradients[term]
            compared += 1
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-12)
    assert compared >= 2


# ---- a method of one's own ----------------------------------------------------------------------


def test_lejepas_statistic_is_epps_and_pulleys():
    """0 for a standard normal's characteristic function, and larger the farther from it."""
    model = build(OWN)
    torch.manual_seed(0)
    normal = torch.randn(4000, 16, dtype=torch.float64)
    near, narrow, far = (
        model.sigreg(each).item() / 4000 for each in (normal, 0.5 * normal, 0 * normal)
    )
    assert 0 < near < 1e-3 < narrow < far
    t = torch.linspace(-5, 5, 2001)
    exact = torch.trapezoid((1 - (-t.square() / 2).exp()).square() * (-t.square()).exp(), t)
    assert far == pytest.approx(exact.item(), rel=1e-3)


OWN_CLASS = """
from grap_solo.methods import CompositeMethod
class Mine(CompositeMethod):
    {}
    def reference_weights(self, cfg): return {{"a": 1.0}}
    def compute_terms(self, projections, targets): return {{}}
"""


def test_a_key_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="int, float, str or bool, not <class 'set'>"):
        Key(set)


def test_reference_weights_that_do_not_do_are_refused(tmp_path):
    for changes, message in (
        (["+method_kwargs.lamb=2"], "they give invariance a reference weight of -1: 0 or more"),
        (["+method_kwargs.lamb=-1"], r"method_kwargs\.lamb: expected a number of 0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(method_digits(OWN, tmp_path, *changes))
    zero = [f"method_kwargs.{key}_loss_weight=0" for key in ("sim", "var", "cov")]
    with pytest.raises(ConfigError, match="every reference weight is 0"):
        prepare(method_digits("vicreg", tmp_path, *zero))


def test_a_comparison_takes_methods_of_several_kinds_and_retrains_each(tmp_path):
    cfg = compose(DIGITS / "vicreg.yaml", [*SMALL, f"checkpoint.dir={tmp_path}"])
    kwargs = {"proj_hidden_dim": 256, "proj_output_dim": 256}
    definitions = {
        "barlow": {"method": "barlow_twins", "method_kwargs": kwargs},
        "own": {"method": OWN, "weighting": {"name": "grap"}},
    }
    names = ["fixed", "barlow", "barlow_finetuned", "own_tuned"]
    cells = {cell.method: cell.cfg for cell in plan(cfg, names, [1], definitions)}
    assert cells["fixed"].method == "grap_vicreg"
    assert cells["barlow"].method == "barlow_twins" and "weighting" not in cells["barlow"]
    assert cells["barlow_finetuned"].method == "grap_barlow_twins"
    assert cells["own"].method == cells["own_tuned"].method == OWN


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        (None, "no_such_file:Mine", r"no_such_file cannot be imported \(ModuleNotFoundError"),
        ("1 +", "mine:Mine", r"mine cannot be imported \(SyntaxError"),
        ("import no_such_module", "mine:Mine", r"mine cannot be imported .*no_such_module"),
        ("Mine = 5", "mine:Mine", "not a CompositeMethod"),
        ("", "mine:Mine", "mine:Mine: no such class"),
        ("class Mine: pass", "mine:Mine", "not a CompositeMethod"),
        ("import sys; sys.exit(0)", "mine:Mine", r"mine cannot be imported \(SystemExit"),
        (OWN_CLASS.format(""), "mine:Mine", "reference_weights: put @staticmethod above it"),
        (OWN_CLASS.format("method_keys = {'a': 1}"), "mine:Mine", "'a' is no Key: write"),
        (
            "from grap_solo.methods import CompositeMethod\nclass Mine(CompositeMethod): pass",
            "mine:Mine",
            "it lacks compute_terms, reference_weights: define it",
        ),
    ],
)
def test_a_path_that_leads_to_no_method_is_refused(text, path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        find_method(path)
    assert "\n" not in str(error.value) and str(error.value).startswith("method: ")


def test_names_of_methods():
    for name in METHODS:
        assert find_method(name) is find_method(f"grap_{name}") is METHODS[name]
        assert not takes_weighting(name) and weighted_name(name) == f"grap_{name}"
        assert weighted_name(f"grap_{name}") == f"grap_{name}"
    assert weighted_name(OWN) == OWN and takes_weighting(OWN)
    with pytest.raises(ConfigError, match="method: .*'barlow': did you mean 'barlow_twins'"):
        find_method("barlow")
    with pytest.raises(ConfigError, match="method: unknown name 'dino'"):
        find_method("dino")


# ---- the base -----------------------------------------------------------------------------------


@pytest.mark.solo_learn
@pytest.mark.parametrize("name", METHOD_KWARGS)
def test_every_method_stands_on_solo_learns_class(name, monkeypatch):
    from solo.methods import METHODS as theirs

    import grap_solo.methods

    assert issubclass(METHODS[name], theirs[name])
    assert theirs[f"grap_{name}"] is grap_solo.methods.METHODS[name]


@pytest.mark.solo_learn
def test_a_method_that_solo_learn_has_not_stands_on_its_base(monkeypatch):
    import solo.methods
    from solo.methods.base import BaseMomentumMethod

    monkeypatch.delattr(solo.methods, "all4one", raising=False)
    method = method_over("solo_learn", monkeypatch, absent=["solo.methods.all4one"])
    assert issubclass(method, BaseMomentumMethod)
    assert any(each.__module__ == "grap_solo.solo.all4one" for each in method.__mro__)
    model = method(method_config("all4one", weighting={"name": "grap"}))
    model.weighting.set_total_steps(8)
    model.log = model.log_dict = lambda *args, **kwargs: None
    assert model.training_step(image_batch(), 0).isfinite()


def test_outside_their_files_no_module_names_a_method():
    package = ROOT / "grap_solo"
    words = re.compile("|".join([*METHODS, "nnclr", "byol", "barlow", "vicreg"]), re.IGNORECASE)
    own = {package / "methods", package / "solo", package / "experiments" / "demo.py"}
    others = [file for file in package.rglob("*.py") if not own & {file, *file.parents}]
    assert len(others) > 20
    for file in others:
        assert not words.search(file.read_text()), file
    for file in ("composite.py", "modules.py", "probed.py", "recorded.py"):
        assert not words.search((package / "methods" / file).read_text()), file


def test_a_fresh_copy_over_a_base_leaves_the_modules_as_they_were(monkeypatch):
    import grap_solo.methods

    fresh = method_over("own", monkeypatch, "vicreg")
    assert fresh is not METHODS["vicreg"] is grap_solo.methods.METHODS["vicreg"]
    assert not issubclass(fresh, CompositeMethod) and fresh.__name__ == "GrapVICReg"


SOLO_LEARNS_FILES = [("cifar10", "cifar"), ("imagenet100", "imagenet-100")]


@pytest.mark.solo_learn
@pytest.mark.parametrize("name", ["vicreg", "vibcreg", "barlow_twins"])
@pytest.mark.parametrize(("dataset", "folder"), SOLO_LEARNS_FILES)
def test_the_files_have_solo_learns_hyper_parameters(dataset, folder, name):
    import solo

    root = Path(solo.__file__).parents[1] / "scripts" / "pretrain" / folder
    theirs = compose(root / ("barlow.yaml" if name == "barlow_twins" else f"{name}.yaml"))
    ours = compose(DIGITS.parent / dataset / f"{name}.yaml")
    for block in ("method", "backbone", "method_kwargs", "max_epochs", "devices", "precision",
                  "strategy", "accelerator", "sync_batchnorm"):  # fmt: skip
        assert ours[block] == theirs[block], block
    plain = OmegaConf.to_container(ours.optimizer), OmegaConf.to_container(theirs.optimizer)
    plain[1]["kwargs"].setdefault("clip_lr", False)  # solo-learn's default.
    assert plain[0] == plain[1] and ours.scheduler.name == theirs.scheduler.name
    for mine, other in zip(ours.augmentations, theirs.augmentations, strict=True):
        for key, value in OmegaConf.to_container(other).items():
            if isinstance(value, dict):
                value.pop("enabled", None)
                assert {k: mine[key][k] for k in value} == value, key
            else:
                assert mine[key] == value, key
