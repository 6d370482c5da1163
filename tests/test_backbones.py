"""Backbones: the width of their embedding, the sizes they take, and what is refused."""

import pytest
import torch
from helpers import digits, method_config

from grap_solo import ConfigError
from grap_solo.methods import find_method
from grap_solo.solo.backbones import build_backbone, embedding_width
from grap_solo.training.config import prepare

WIDTHS = {
    "test_resnet": 96,
    "resnet18": 512,
    "test_efficientnet": 256,
    "mobilenetv3_small_050": 1024,  # num_features is 288.
    "ghostnet_100": 1280,  # num_features is 960.
    "convnext_atto": 320,
}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_width_is_that_of_a_real_forward_pass(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert embedding_width(name, "digits", {}, 32) == WIDTHS[name]
    assert torch.equal(torch.get_rng_state(), before)
    model, width = build_backbone(name, "digits", {}, 32)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, width)
    assert name == "resnet18" or model.num_features == width


@pytest.mark.parametrize("method", ["all4one", "vicreg"])
def test_a_method_is_built_on_the_width(method):
    changes = {"backbone": {"name": "mobilenetv3_small_050"}, "data": {"dataset": "digits"}}
    model = find_method(method)(method_config(method, **changes))
    assert model.classifier.in_features == model.projector[0].in_features == 1024
    model(torch.randn(2, 3, 32, 32))
    if method == "all4one":
        assert model.momentum_forward(torch.randn(2, 3, 32, 32))["feats"].shape == (2, 1024)


def test_a_model_that_takes_its_size_as_an_argument_is_built_for_it():
    kwargs = {"img_size": 32, "patch_size": 4}
    model, width = build_backbone("test_vit", "digits", kwargs, 32)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, width)
    assert build_backbone("test_vit", "digits", kwargs)[1] == width  # As solo-learn's base calls.


BAD = [
    ("vit_tiny_patch16_224", {}, r"of 24x24, the augm.*: set \+backbone\.kwargs\.img_size=24$"),
    ("swin_tiny_patch4_window7_224", {}, r"of 24x24, .*set \+backbone\.kwargs\.img_size=24$"),
    ("levit_128s", {}, r"backbone\.name: levit_128s does not take images of 24x24, .*crop_size"),
    ("inception_v3", {}, r"backbone\.name: inception_v3 does not take images of 24x24"),
    ("zzz", {}, r"backbone\.name: unknown name 'zzz': use one of .* and \d+ others$"),
    ("timm/resnet18", {}, r"backbone\.name: unknown name 'timm/resnet18': did you mean 'resnet18'"),
    ("resnet18", {"foo": 1}, r"backbone\.kwargs: .*foo"),
    ("test_resnet", {"foo": 1}, r"backbone\.kwargs: .*foo"),
    ("test_resnet", {"num_classes": 3}, r"backbone\.kwargs: .*num_classes"),
    ("test_resnet", {"layers": 3}, r"backbone\.kwargs: "),
    ("test_resnet", {"in_chans": 1}, r"test_resnet does not take images of 24x24.*channel"),
    ("test_resnet", {"global_pool": ""}, r"gives \(2, 96, 1, 1\) for two images, not one vector"),
    ("test_resnet", {"features_only": True}, r"gives list for two images"),
    ("test_resnet", {"drop_rate": 3}, r"backbone\.(name|kwargs): .*probability"),
]


@pytest.mark.parametrize(("name", "kwargs", "message"), BAD)
def test_what_does_not_run_is_refused_in_one_line(name, kwargs, message):
    cfg = digits("runs", f"backbone.name={name}")
    cfg.backbone = {"name": name, "kwargs": kwargs}
    with pytest.raises(ConfigError, match=message) as error:
        prepare(cfg)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1200


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("resnet18", {"weights": "IMAGENET1K_V1"}), ("test_resnet", {"pretrained": True})],
)
def test_weights_that_cannot_be_downloaded_are_refused_in_one_line(name, kwargs, monkeypatch):
    """As without a network: nothing listens at the proxy's port."""
    for each in ("HTTP_PROXY", "HTTPS_PROXY", "https_proxy", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(each, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", "/nonexistent/torch")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # Else it tries 50 s.
    (key,) = kwargs
    assert embedding_width(name, "digits", kwargs, 32) == WIDTHS[name]
    with pytest.raises(ConfigError, match=rf"^backbone\.kwargs\.{key}: the weights cannot be load"):
        build_backbone(name, "digits", kwargs, 32)
