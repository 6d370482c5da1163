"""Views made a batch at a time: each step against PIL's, their randomness, the loader."""

import functools
import random
from itertools import permutations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import CONFIGS
from omegaconf import OmegaConf
from PIL import Image, ImageFilter
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from grap_solo import ConfigError
from grap_solo.compose import compose
from grap_solo.data import (
    batched,
    batched_operations,
    batched_views,
    evaluation_loader,
    sampling,
)
from grap_solo.data.augmentations import build_pipeline, build_views
from grap_solo.data.datasets import Digits, Part
from grap_solo.data.sampling import EpochSampler

OFF = {
    "rrc": {"enabled": False, "crop_min_scale": 0.08, "crop_max_scale": 1.0},
    "crop_size": 32,
    "num_crops": 1,
}
FULL_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
LEAST_P = 1e-4  # Of a test between two samples of one law; all seeds are fixed.


@functools.cache
def digit_images():
    return Digits(True)


@functools.cache
def coloured(count=300):
    """Real images with colours: three digits each, one for each channel; uint8 (N, 3, 32, 32)."""
    gray = batched.decode(digit_images())[: count + 2, 0]
    return torch.stack([gray[k : k + count] for k in range(3)], 1)


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def by_pil(images, function, *parameters):
    """What a function of a PIL image and its parameters makes of each image."""
    made = [function(to_pil(x), *each) for x, *each in zip(images, *parameters)]
    return torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1).float() for each in made])


def entry(**changes):
    return OmegaConf.create({**OFF, **changes})


def pipelines(**changes):
    """A YAML entry's pipeline on PIL images, and the batched one."""
    transform = build_pipeline("digits", entry(**changes))
    return transform, batched_views.Pipeline(transform)


def uniform(count, columns, seed=0):
    return np.random.default_rng(seed).random((count, columns), dtype=np.float32)


def loader(images=None, seed=5, epoch=0, batch=64, rank=0, world=1, drop_last=True, **kwargs):
    """A loader of the digits' two views; as one of several processes, if asked."""
    images = images or digit_images()
    augmentations = OmegaConf.load(CONFIGS / "augmentations/asymmetric_digits.yaml")
    cfg = OmegaConf.create(
        {
            "data": {"dataset": "digits", "num_workers": kwargs.pop("num_workers", 0)},
            "augmentations": augmentations,
            "optimizer": {"batch_size": batch},
            "accelerator": "cpu",
        }
    )
    return batched.batched_loader(cfg, images, EpochSampler(len(images), seed, epoch), drop_last)


def assert_same(ours, theirs):
    for (i, v, y), (j, w, z) in zip(ours, theirs, strict=True):
        assert torch.equal(i, j) and torch.equal(y, z)
        assert all(torch.equal(a, b) for a, b in zip(v, w, strict=True))


# Each step with given parameters. Values are from 0 to 255.

FACTORS = torch.from_numpy(np.random.default_rng(1).uniform(0.2, 1.8, 300).astype(np.float32))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_enhancements_are_pils_but_for_ties(name):
    ours = getattr(batched_operations, f"adjust_{name}")(coloured().float(), FACTORS)
    pils = by_pil(coloured(), getattr(F, f"adjust_{name}"), FACTORS.tolist())
    # To the bit, where PIL was built without fused multiply-add.
    assert (ours - pils).abs().max() <= 1 and (ours != pils).float().mean() < 0.001


def test_hue_is_pils_but_for_ties():
    shifts = (FACTORS - 1) / 1.6
    ours = batched_operations.adjust_hue(coloured().float(), shifts)
    pils = by_pil(coloured(), F.adjust_hue, shifts.tolist())
    apart = (ours - pils).abs()
    assert apart.mean() < 0.005 and (apart > 0).float().mean() < 0.002 and apart.max() <= 8


def test_steps_without_parameters_are_pils_to_the_bit():
    images = coloured()
    pils = by_pil(images, lambda x: F.rgb_to_grayscale(x, 3))
    assert torch.equal(batched_operations.to_grayscale(images.float()), pils)
    for threshold in (128, 17):
        pils = by_pil(images, lambda x, t=threshold: F.solarize(x, t))
        assert torch.equal(batched_operations.solarize(images.float(), threshold), pils)
    assert torch.equal(batched_operations.equalize(images.float()), by_pil(images, F.equalize))
    assert torch.equal(batched_operations.flip(images.float()), by_pil(images, F.horizontal_flip))


def test_blur_is_pils_but_for_ties():
    radii = 0.1 + 1.9 * (FACTORS - 0.2) / 1.6
    pils = by_pil(coloured(), lambda x, r: x.filter(ImageFilter.GaussianBlur(r)), radii.tolist())
    apart = (batched_operations.blur(coloured().float(), radii) - pils).abs()
    assert apart.mean() < 0.001 and apart.max() <= 1
    # Radii that reach further than the image is wide, too.
    few, wide = coloured()[:4], torch.tensor([3.0, 9.0, 20.0, 60.0])
    pils = by_pil(few, lambda x, r: x.filter(ImageFilter.GaussianBlur(r)), wide.tolist())
    assert (batched_operations.blur(few.float(), wide) - pils).abs().max() <= 1


# Since version 13, PIL resizes down before across where that is less work: another rounding.
@pytest.mark.parametrize(("size", "most"), [(32, 0.001), (48, 0.001), (24, 0.05)])
def test_crops_are_pils(size, most):
    crop = batched_views.Crop((size, size), (0.08, 1.0), (3 / 4, 4 / 3))
    boxes = crop.boxes(uniform(300, crop.columns), 32, 32)
    pils = by_pil(
        coloured(),
        lambda x, box: F.resized_crop(
            x, *box, size=[size, size], interpolation=v2.InterpolationMode.BICUBIC
        ),
        boxes.tolist(),
    )
    apart = (
        batched_operations.resize_boxes(coloured(), torch.from_numpy(boxes), (size, size)) - pils
    ).abs()
    assert apart.mean() < most


@pytest.mark.parametrize(("shape", "size"), [((32, 32), 32), ((32, 32), 20), ((20, 32), 25)])
def test_resize_is_pils(shape, size):
    images = coloured()[:40, :, : shape[0], : shape[1]]
    theirs, ours = pipelines(crop_size=size)
    expected = torch.stack([theirs(to_pil(x)) for x in images])
    found = ours(images, uniform(len(images), ours.columns))
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.001 and (found - expected).abs().max() < 0.02


def test_a_whole_view_is_pils_with_the_same_draws():
    """Every step, in its place, with the adjustments in each image's own order."""
    _, pipeline = pipelines(
        rrc={"enabled": True, "crop_min_scale": 0.3, "crop_max_scale": 1.0},
        color_jitter={"prob": 0.8, **FULL_JITTER},
        grayscale={"prob": 0.3},
        gaussian_blur={"prob": 0.4},
        solarization={"prob": 0.3},
        equalization={"prob": 0.2},
        horizontal_flip={"prob": 0.5},
    )
    images, draws = coloured(), uniform(300, pipeline.columns)
    crop, jitter, *_ = pipeline.steps
    boxes = crop.boxes(draws[:, : crop.columns], 32, 32)
    jittering = draws[:, crop.columns : crop.columns + jitter.columns]
    order = jitter.order(jittering)
    factors = np.stack([jitter.factors(jittering, number) for number in range(4)], 1)
    rest = draws[:, crop.columns + jitter.columns :]
    adjust = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]

    def by_hand(x, k):
        bicubic = v2.InterpolationMode.BICUBIC
        x = F.resized_crop(x, *boxes[k].tolist(), size=[32, 32], interpolation=bicubic)
        if jittering[k, 0] < 0.8:
            for number in order[k]:
                x = adjust[number](x, float(factors[k, number]))
        gray, blurred, radius, solar, equal, flipped = rest[k]
        if gray < 0.3:
            x = F.rgb_to_grayscale(x, 3)
        if blurred < 0.4:
            x = x.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * float(radius)))
        if solar < 0.3:
            x = F.solarize(x, 128)
        if equal < 0.2:
            x = F.equalize(x)
        return F.horizontal_flip(x) if flipped < 0.5 else x

    expected = by_pil(images, by_hand, range(300))
    found = (pipeline(images, draws) * 0.35 + 0.31) * 255
    apart = (found - expected).abs()
    # A difference of one before solarisation or equalisation is a larger one behind it.
    assert apart.mean() < 0.1 and (apart > 0.1).float().mean() < 0.01


def test_normalisation_is_torchvisions():
    theirs = build_pipeline("cifar10", entry())
    ours = batched_views.Pipeline(theirs)
    expected = torch.stack([theirs(to_pil(x)) for x in coloured()[:20]])
    found = ours(coloured()[:20], uniform(20, ours.columns))
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


# What is drawn.


@pytest.mark.parametrize("shape", [(32, 32), (20, 48), (48, 20)])
def test_crops_follow_torchvisions_law(shape):
    """Areas, aspect ratios and places of the boxes; long images need the middle as a way out."""
    scale = (0.08, 1.0) if shape == (32, 32) else (0.3, 1.0)
    theirs = v2.RandomResizedCrop(32, scale=scale)
    torch.manual_seed(0)
    image = torch.zeros(3, *shape)
    made = [theirs.make_params([image]) for _ in range(3000)]
    expected = np.array([[each[k] for k in ("top", "left", "height", "width")] for each in made])
    crop = batched_views.Crop((32, 32), theirs.scale, theirs.ratio)
    found = crop.boxes(uniform(3000, crop.columns), *shape)
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 0] + box[:, 2],
    ):
        assert ks_2samp(measure(found), measure(expected), method="asymp").pvalue > LEAST_P
    assert found[:, :2].min() >= 0
    assert (found[:, 0] + found[:, 2]).max() == shape[0]
    assert (found[:, 1] + found[:, 3]).max() == shape[1]
    if shape != (32, 32):
        middle = crop._middle(*shape)
        share = [(boxes == middle).all(1).mean() for boxes in (found, expected)]
        assert share[1] > 0.05 and share[0] == pytest.approx(share[1], abs=0.03)


def test_adjustments_come_in_every_order_equally_often():
    jitter = batched_views.Jitter(1.0, [(0.6, 1.4)] * 4)
    draws = uniform(4800, jitter.columns)
    orders = list(map(tuple, jitter.order(draws).tolist()))
    counts = [orders.count(each) for each in permutations(range(4))]
    assert chisquare(counts).pvalue > LEAST_P
    factors = jitter.factors(draws, 2)
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
    assert abs(np.corrcoef(factors, jitter.factors(draws, 3))[0, 1]) < 0.06


def statistics(views):
    """Numbers of each view: moments, colours, sharpness, symmetry; shape (N, 7)."""
    x = views.double()
    red, green, blue = x.mean((2, 3)).unbind(1)
    right = x[..., 16:].mean((1, 2, 3)) - x[..., :16].mean((1, 2, 3))
    edges = x.diff(dim=-1).abs().mean((1, 2, 3)) + x.diff(dim=-2).abs().mean((1, 2, 3))
    columns = [x.mean((1, 2, 3)), x.std((1, 2, 3)), red - green, green - blue, edges, right]
    return torch.stack([*columns, x.amax((1, 2, 3))], 1).numpy()


KEYS = {
    "rrc": {"rrc": {"enabled": True, "crop_min_scale": 0.08, "crop_max_scale": 1.0}},
    "color_jitter": {"color_jitter": {"prob": 0.8, **FULL_JITTER}},
    "brightness": {
        "color_jitter": {"prob": 1, "brightness": 0.4, "contrast": 0, "saturation": 0, "hue": 0}
    },
    "grayscale": {"grayscale": {"prob": 0.2}},
    "gaussian_blur": {"gaussian_blur": {"prob": 0.5}},
    "solarization": {"solarization": {"prob": 0.2}},
    "equalization": {"equalization": {"prob": 0.3}},
    "horizontal_flip": {"horizontal_flip": {"prob": 0.5}},
}


def assert_alike(theirs, ours, images):
    """Views by both pipelines of the same images have the same distribution of statistics."""
    torch.manual_seed(0)
    expected = statistics(torch.stack([theirs(to_pil(x)) for x in images]))
    found = statistics(ours(images, uniform(len(images), ours.columns)))
    for theirs_, ours_ in zip(expected.T.round(4), found.T.round(4), strict=True):
        assert ks_2samp(theirs_, ours_, method="asymp").pvalue > LEAST_P
        assert ours_.mean() == pytest.approx(theirs_.mean(), abs=0.25 * theirs_.std() + 1e-3)


@pytest.mark.parametrize("key", KEYS)
def test_each_keys_views_are_distributed_as_pils(key):
    theirs, ours = pipelines(**KEYS[key])
    one = coloured()[7].expand(900, 3, 32, 32)  # What varies is the draws alone.
    assert_alike(theirs, ours, one)


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("digits", "asymmetric_digits"),
        ("cifar10", "asymmetric_cifar"),
        ("cifar10", "symmetric_cifar"),
    ],
)
def test_views_of_the_yaml_files_are_distributed_as_pils(dataset, file):
    augmentations = OmegaConf.load(CONFIGS / "augmentations" / f"{file}.yaml")
    for theirs in build_views(dataset, augmentations):
        assert_alike(theirs, batched_views.Pipeline(theirs), coloured(900))


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_a_probability_is_the_share_of_the_images(probability):
    _, ours = pipelines(horizontal_flip={"prob": probability})
    one = coloured()[7].expand(4000, 3, 32, 32)
    plain = batched_views.Pipeline(build_pipeline("digits", entry()))(one[:1], uniform(1, 0))
    changed = (ours(one, uniform(4000, ours.columns)) != plain).any(1).any(1).any(1)
    assert changed.float().mean() == pytest.approx(probability, abs=0.03)


def test_nothing_is_written_over():
    images = coloured().clone()
    _, ours = pipelines(color_jitter={"prob": 0.5, **FULL_JITTER}, grayscale={"prob": 1.0},
                        solarization={"prob": 0.5}, horizontal_flip={"prob": 0.5})  # fmt: skip
    ours(images, uniform(300, ours.columns))
    assert torch.equal(images, coloured())


def test_every_yaml_file_builds():
    files = sorted(CONFIGS.glob("augmentations/*.yaml"))
    assert {each.stem.partition("_")[2] for each in files} == {"digits", "cifar", "imagenet100"}
    for file in files:
        augmentations = OmegaConf.load(file)
        views = [batched_views.Pipeline(each) for each in build_views("cifar10", augmentations)]
        size = augmentations[0].crop_size
        made = [each(coloured()[:2], uniform(2, each.columns)) for each in views]
        assert [each.shape for each in made] == [(2, 3, size, size)] * 2


def test_an_unknown_step_is_refused():
    steps = build_pipeline("digits", entry()).transforms
    with pytest.raises(TypeError, match="RandomVerticalFlip: no such transform on batches"):
        batched_views.Pipeline(v2.Compose([v2.RandomVerticalFlip(), *steps]))


# The loader.


def test_batches_are_solo_learns():
    images = digit_images()
    batches = list(loader(batch=100))
    assert len(batches) == len(loader(batch=100)) == 12  # The last 57 images make no batch.
    for indexes, views, labels in batches:
        assert [each.shape for each in views] == [(100, 3, 24, 24)] * 2
        assert all(each.dtype == torch.float32 for each in views)
        assert labels.dtype == indexes.dtype == torch.int64
        assert labels.tolist() == images.targets[indexes.numpy()].tolist()
    assert len({k for batch in batches for k in batch[0].tolist()}) == 1200
    whole = list(loader(batch=100, drop_last=False))
    assert len(whole) == 13 and len(whole[-1][0]) == 57
    # The views are of the images that the indexes name: nearest to their own.
    indexes, views, _ = batches[0]
    own = F.resize(batched.decode(images)[indexes].float(), [24, 24]).flatten(1)
    for view in views:
        alike = torch.corrcoef(torch.cat([view.flatten(1), own]))[:100, 100:]
        assert alike.diag().mean() > alike.mean() + 0.2


def test_views_of_one_image_differ():
    _, (first, second), _ = next(iter(loader()))
    assert (first == second).all(1).all(1).all(1).float().mean() < 0.1
    _, ours = pipelines(**KEYS["rrc"])
    same = ours(coloured()[7].expand(50, 3, 32, 32), uniform(50, ours.columns))
    assert len({each.numpy().tobytes() for each in same}) > 45  # Some boxes come twice.


def test_an_epoch_does_not_depend_on_the_past():
    through, straight = loader(), loader()
    seen = []
    for epoch in range(4):
        through.set_epoch(epoch)
        seen.append([next(iter(through))] if epoch < 3 else list(through))
    straight.set_epoch(3)
    assert_same(seen[3], list(straight))
    assert_same(seen[3], list(loader(epoch=3)))
    assert not torch.equal(seen[0][0][0], seen[3][0][0])
    other = next(iter(loader(seed=6)))
    assert not torch.equal(other[0], seen[0][0][0])
    # The same image gets other views in another epoch, and in another batch other draws.
    views = {epoch: dict(zip(i.tolist(), v[0])) for epoch in (0, 1)
             for i, v, _ in [next(iter(loader(epoch=epoch, batch=1200)))]}  # fmt: skip
    shared = views[0].keys() & views[1].keys()
    assert not any(torch.equal(views[0][k], views[1][k]) for k in shared)
    seeds = [each.seed for each in batched.BatchPlanSampler(EpochSampler(1257, 5), 64, True)]
    assert len(set(seeds)) == 19


def test_a_loader_that_starts_again_within_an_epoch_draws_anew():
    """As the shorter of two does, whose batches are combined."""
    few = loader(Part(digit_images(), np.arange(40)), drop_last=False)
    (first,), (second,) = list(few), list(few)
    assert len(first[0]) == 40 and sorted(first[0].tolist()) == sorted(second[0].tolist())
    views = [dict(zip(batch[0].tolist(), batch[1][0])) for batch in (first, second)]
    assert not any(torch.equal(views[0][k], views[1][k]) for k in range(40))


def test_the_global_random_states_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    made = list(loader())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    torch.manual_seed(99)
    assert_same(made, list(loader()))


def test_worker_processes_change_nothing():
    assert_same(list(loader(batch=200)), list(loader(batch=200, num_workers=1)))


def test_two_processes_share_a_step(monkeypatch):
    """Their batches together are, image by image, the one batch of a single process."""

    def on(rank, world):
        for module in (sampling, batched):
            monkeypatch.setattr(module, "rank", lambda: rank)
            monkeypatch.setattr(module, "world_size", lambda: world)

    on(0, 1)
    together = list(loader(batch=64, epoch=2))
    parts = []
    for rank in (0, 1):
        on(rank, 2)
        parts.append(list(loader(batch=32, epoch=2)))
    assert len(parts[0]) == len(parts[1]) == len(together) == 19
    for one, first, second in zip(together, *parts, strict=True):
        for k, part in enumerate((first, second)):
            assert torch.equal(one[0][k::2], part[0]) and torch.equal(one[2][k::2], part[2])
            for ours, theirs in zip(one[1], part[1], strict=True):
                torch.testing.assert_close(ours[k::2], theirs, atol=0.02, rtol=0)


def test_images_of_several_sizes_are_refused():
    class Uneven(Digits):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return (image.resize((20, 32)) if index == 3 else image), label

    with pytest.raises(ConfigError, match=r"data\.batched: image 3 is 20x32, not 32x32"):
        loader(Uneven(True))


def test_decoded_pixels_are_the_images():
    images = digit_images()
    pixels = batched.decode(images)
    assert pixels.dtype == torch.uint8 and pixels.shape == (1257, 3, 32, 32)
    assert to_pil(pixels[11]).tobytes() == images[11][0].tobytes()


class Recorder(pl.LightningModule):
    """Trains nothing; keeps what it is given, by epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {}

    def training_step(self, batch, _):
        indexes, views, _ = batch
        self.seen.setdefault(self.current_epoch, []).append((indexes, views[0].sum().item()))
        return self.weight * views[0].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(path, batches, epochs, checkpoint=None, **kwargs):
    model = Recorder()
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, devices=1,
                         enable_progress_bar=False, enable_model_summary=False,
                         enable_checkpointing=False, default_root_dir=path, **kwargs)  # fmt: skip
    trainer.fit(model, batches, ckpt_path=checkpoint)
    trainer.save_checkpoint(path / "last.ckpt")
    return model.seen


@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_trains_on_it_and_a_resumed_run_repeats_it(tmp_path, workers):
    straight = fit(tmp_path, loader(batch=400, num_workers=workers), 3)
    assert [len(straight[epoch]) for epoch in range(3)] == [3, 3, 3]
    fit(tmp_path, loader(batch=400, num_workers=workers), 1)
    resumed = fit(
        tmp_path,
        loader(batch=400, epoch=1, num_workers=workers),
        3,
        checkpoint=tmp_path / "last.ckpt",
    )
    assert sorted(resumed) == [1, 2]
    for epoch in resumed:
        for (i, x), (j, y) in zip(straight[epoch], resumed[epoch], strict=True):
            assert torch.equal(i, j) and x == y


def test_lightning_puts_no_sampler_in_its_place(tmp_path, monkeypatch):
    """Not even one that shares the images out among processes, which ours does itself."""
    connector = pl.trainer.connectors.data_connector._DataConnector
    monkeypatch.setattr(connector, "_requires_distributed_sampler", lambda self, given: True)
    batches = loader(batch=400)
    sampler = batches.sampler
    seen = fit(tmp_path, batches, 1, use_distributed_sampler=True)
    assert batches.sampler is sampler
    expected = [indexes for indexes, _, _ in loader(batch=400)]
    for (found, _), indexes in zip(seen[0], expected, strict=True):
        assert torch.equal(found, indexes)


def test_validation_images_that_are_kept_are_those_of_the_loader(monkeypatch):
    cfg = compose(CONFIGS / "digits" / "all4one.yaml")
    images = digit_images()
    plain = list(evaluation_loader(cfg, images, keep=True))
    cfg.data.batched = True
    loader = evaluation_loader(cfg, images, keep=True)
    monkeypatch.setattr(Digits, "__getitem__", None)  # None is asked for again.
    for _ in range(2):
        kept = list(loader)
        assert len(kept) == len(plain) == len(loader) > 1
        for (pixels, labels), (others, truth) in zip(kept, plain, strict=True):
            assert torch.equal(pixels, others) and torch.equal(labels, truth)
