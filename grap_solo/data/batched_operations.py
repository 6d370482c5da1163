"""Operations on batches of images, each image with parameters of its own, as PIL does them to one.

Images are of shape (B, 3, H, W), parameters of shape (B,). Between the operations images are
float32 with whole values from 0 to 255, rounded where PIL rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

BLUR_PASSES = 3  # PIL's: its Gaussian blur is a box blur, this often.


def resize_boxes(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """PIL's bicubic resize, with antialiasing, of a box of each image: across, then down. (Where a
    box shrinks in height, PIL goes down first since version 13: the roundings differ.)

    Args:
        images: uint8, shape (B, 3, H, W).
        boxes: top, left, height and width in whole pixels, shape (B, 4).
        size: height and width of the result.
    """
    top, left, height, width = boxes.float().unbind(1)
    across = _resize_matrix(left, width, images.shape[3], size[1])
    down = _resize_matrix(top, height, images.shape[2], size[0])
    rows = _round(_along_rows(images.float(), across))
    return _round(_along_rows(rows.mT, down)).mT.contiguous()


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """PIL's ``ImageEnhance.Brightness``."""
    return _cut(images * _of_each(factors))


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """PIL's ``ImageEnhance.Contrast``: away from the mean gray, a whole number."""
    mean = _round(_gray(images).mean((1, 2, 3), keepdim=True))
    return _blend(mean, images, factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """PIL's ``ImageEnhance.Color``: away from the gray image."""
    return _blend(_gray(images), images, factors)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """torchvision's ``adjust_hue`` on PIL's 8-bit HSV; the shifts are shares of the circle."""
    high, low = images.amax(1), images.amin(1)
    spread = (high - low).clamp(min=1)  # Where it is 0, so is the saturation.
    red, green, blue = ((high.unsqueeze(1) - images) / spread.unsqueeze(1)).unbind(1)
    sixths = torch.where(images[:, 1] == high, 2 + red - blue, 4 + green - red)
    sixths = torch.where(images[:, 0] == high, blue - green, sixths)
    hue = _wrap(sixths / 6, 1).mul_(255).floor_()
    saturation = ((high - low) / high.clamp(min=1)).mul_(255).floor_().div_(255)
    hue = _wrap(hue + (shifts * 255).trunc().view(-1, 1, 1), 256)
    # Back: each channel falls from the value by as much as the hue is away from it.
    offset = torch.arange(5, 0, -2, device=images.device).view(1, 3, 1, 1)
    place = _wrap(hue.mul_(6 / 255).unsqueeze(1) + offset, 6)
    away = torch.minimum(place, 4 - place).clamp_(0, 1)
    return _round(high.unsqueeze(1) * (1 - saturation.unsqueeze(1) * away))


def grayscale(images: Tensor) -> Tensor:
    """PIL's luma, in all three channels."""
    return _gray(images).expand_as(images).contiguous()


def blur(images: Tensor, radii: Tensor) -> Tensor:
    """PIL's ``GaussianBlur``: three box blurs, each of the variance that a third of it has."""
    for _ in range(2):  # Across and down.
        matrix = _box_matrix(_box_radius(radii), images.shape[3])
        for _ in range(BLUR_PASSES):
            images = _round(_along_rows(images, matrix))
        images = images.mT
    return images


def solarize(images: Tensor, threshold: float) -> Tensor:
    """PIL's ``ImageOps.solarize``: values from the threshold on are inverted."""
    return torch.where(images >= threshold, 255 - images, images)


def equalize(images: Tensor) -> Tensor:
    """PIL's ``ImageOps.equalize``, of each channel by itself."""
    equalized: Tensor = v2.functional.equalize(images.to(torch.uint8))
    return equalized.float()


def flip(images: Tensor) -> Tensor:
    """Left and right exchanged."""
    return images.flip(-1)


def _of_each(parameters: Tensor) -> Tensor:
    return parameters.view(-1, 1, 1, 1)


def _cut(images: Tensor) -> Tensor:
    """To whole values as in a C cast, which PIL's enhancements end with."""
    return images.clamp_(0, 255).floor_()


def _round(images: Tensor) -> Tensor:
    """To the nearest whole values, halves up."""
    return images.add_(0.5).floor_().clamp_(0, 255)


def _wrap(values: Tensor, period: float) -> Tensor:
    """Into [0, period). Much faster on CPUs than the remainder operator."""
    return values - (values / period).floor_().mul_(period)


def _gray(images: Tensor) -> Tensor:
    """PIL's luma, shape (B, 1, H, W). Its fixed-point sums are whole and below 2^24: exact."""
    red, green, blue = images.split(1, dim=1)
    sum_ = red * 19595 + green * 38470 + blue * 7471
    return sum_.add_(0x8000).mul_(1 / 65536).floor_()


def _blend(start: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """From ``start`` through the images and beyond: PIL's ``Image.blend``."""
    return _cut((images - start).mul_(_of_each(factors)).add_(start))


def _along_rows(images: Tensor, matrices: Tensor) -> Tensor:
    """Each row x of an image (3, H, W) becomes M x; matrices of shape (B, V, W)."""
    flat = images.flatten(1, 2) @ matrices.mT
    return flat.unflatten(1, images.shape[1:3])


def _resize_matrix(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """PIL's bicubic weights (B, target, source) for a part of each row or column."""
    scale = (length / target).view(-1, 1, 1)
    first, last = start.view(-1, 1, 1), (start + length).view(-1, 1, 1)
    pixels = torch.arange(source, device=start.device) + 0.5
    centres = first + (torch.arange(target, device=start.device).view(1, -1, 1) + 0.5) * scale
    away = ((pixels - centres) / scale.clamp(min=1)).abs_().clamp_(max=2)
    near = (1.5 * away - 2.5) * away.square() + 1
    far = ((2.5 - 0.5 * away) * away - 4) * away + 2
    weights = torch.where(away < 1, near, far).mul_((pixels > first) & (pixels < last))
    return weights / weights.sum(-1, keepdim=True)


def _box_radius(sigma: Tensor) -> Tensor:
    """The radius of PIL's box blur for a Gaussian's standard deviation in pixels, shape (B,)."""
    variance = sigma.double().square() / BLUR_PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return (whole + part / (6 * (variance - (whole + 1).square()))).float()


def _box_matrix(radii: Tensor, size: int) -> Tensor:
    """A box blur's weights (B, size, size): a fractional radius takes a part of the next pixel,
    and beyond the edge the last pixel goes on."""
    radius = radii.view(-1, 1, 1)
    whole, weight = radius.floor(), 1 / (2 * radius + 1)
    pixels = torch.arange(size, device=radii.device)
    away = torch.arange(-1, size, device=radii.device) - pixels.view(-1, 1)
    # The sums of the weights up to each pixel, of all those beyond the edges at the edges.
    sums = (away + 1 + radius) * weight
    sums = torch.where(away < -whole - 1, 0, torch.where(away > whole, 1, sums))
    sums[..., 0], sums[..., -1] = 0, 1
    return sums.diff(dim=-1)
