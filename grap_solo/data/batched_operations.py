"""PIL's operations on whole batches of images, with separate parameters for each image.

Images are of shape (B, 3, H, W), parameters of shape (B,). Between the operations images are
float32 with whole values from 0 to 255, rounded where PIL rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

BLUR_PASSES = 3  # PIL approximates a Gaussian blur by this many box blurs.


def resize_boxes(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops a box of each image and resizes it as PIL's antialiased bicubic resize does.

    The rows are resized first, then the columns. Since version 13, PIL resizes the columns first if
    a box shrinks in height: the roundings then differ.

    Args:
        images: uint8, shape (B, 3, H, W).
        boxes: top, left, height and width in whole pixels, shape (B, 4).
        size: height and width of the result.
    """
    top, left, height, width = boxes.float().unbind(1)
    across = _resize_matrix(left, width, images.shape[3], size[1])
    down = _resize_matrix(top, height, images.shape[2], size[0])
    rows = _round(_multiply_rows(images.float(), across))
    return _round(_multiply_rows(rows.mT, down)).mT.contiguous()


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """PIL's ``ImageEnhance.Brightness``: multiplies by the factors."""
    return _truncate(images * _align_with_images(factors))


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """PIL's ``ImageEnhance.Contrast``: blends with the mean gray, rounded to a whole number."""
    mean = _round(_gray(images).mean((1, 2, 3), keepdim=True))
    return _blend(mean, images, factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """PIL's ``ImageEnhance.Color``: blends with the gray image."""
    return _blend(_gray(images), images, factors)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """torchvision's ``adjust_hue`` in PIL's 8-bit HSV. A shift of 1 is the full circle of hues."""
    high, low = images.amax(1), images.amin(1)
    spread = (high - low).clamp(min=1)  # For a spread of 0 the saturation is 0 as well.
    red, green, blue = ((high.unsqueeze(1) - images) / spread.unsqueeze(1)).unbind(1)
    sixths = torch.where(images[:, 1] == high, 2 + red - blue, 4 + green - red)
    sixths = torch.where(images[:, 0] == high, blue - green, sixths)
    hue = _wrap(sixths / 6, 1).mul_(255).floor_()
    saturation = ((high - low) / high.clamp(min=1)).mul_(255).floor_().div_(255)
    hue = _wrap(hue + (shifts * 255).trunc().view(-1, 1, 1), 256)
    # Back to RGB: a channel falls below the value by the distance of the hue from its color.
    offset = torch.arange(5, 0, -2, device=images.device).view(1, 3, 1, 1)
    place = _wrap(hue.mul_(6 / 255).unsqueeze(1) + offset, 6)
    away = torch.minimum(place, 4 - place).clamp_(0, 1)
    return _round(high.unsqueeze(1) * (1 - saturation.unsqueeze(1) * away))


def to_grayscale(images: Tensor) -> Tensor:
    """Replaces all three channels by PIL's luma."""
    return _gray(images).expand_as(images).contiguous()


def blur(images: Tensor, radii: Tensor) -> Tensor:
    """PIL's ``GaussianBlur``: three box blurs, each with a third of the variance."""
    for _ in range(2):  # Rows, then columns.
        matrix = _box_matrix(_box_radius(radii), images.shape[3])
        for _ in range(BLUR_PASSES):
            images = _round(_multiply_rows(images, matrix))
        images = images.mT
    return images


def solarize(images: Tensor, threshold: float) -> Tensor:
    """PIL's ``ImageOps.solarize``: inverts the values at or above the threshold."""
    return torch.where(images >= threshold, 255 - images, images)


def equalize(images: Tensor) -> Tensor:
    """PIL's ``ImageOps.equalize``: equalizes the histogram of each channel."""
    equalized: Tensor = v2.functional.equalize(images.to(torch.uint8))
    return equalized.float()


def flip(images: Tensor) -> Tensor:
    """Exchanges left and right."""
    return images.flip(-1)


def _align_with_images(parameters: Tensor) -> Tensor:
    """Reshapes parameters (B,) to (B, 1, 1, 1)."""
    return parameters.view(-1, 1, 1, 1)


def _truncate(images: Tensor) -> Tensor:
    """Truncates to whole values from 0 to 255 in place, like the C cast in PIL's enhancements."""
    return images.clamp_(0, 255).floor_()


def _round(images: Tensor) -> Tensor:
    """Rounds in place to the nearest whole values from 0 to 255, halves up."""
    return images.add_(0.5).floor_().clamp_(0, 255)


def _wrap(values: Tensor, period: float) -> Tensor:
    """Wraps values into [0, period). On CPUs this is much faster than the remainder operator."""
    return values - (values / period).floor_().mul_(period)


def _gray(images: Tensor) -> Tensor:
    """PIL's luma, shape (B, 1, H, W). Exact in float32: PIL's fixed-point sums are below 2^24."""
    red, green, blue = images.split(1, dim=1)
    sum_ = red * 19595 + green * 38470 + blue * 7471
    return sum_.add_(0x8000).mul_(1 / 65536).floor_()


def _blend(start: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """PIL's ``Image.blend``: ``start`` for a factor of 0, the images for 1, extrapolated beyond."""
    return _truncate((images - start).mul_(_align_with_images(factors)).add_(start))


def _multiply_rows(images: Tensor, matrices: Tensor) -> Tensor:
    """Multiplies each row of an image, (W,), by the image's matrix, (V, W).

    The images are (B, 3, H, W), the matrices (B, V, W), the result (B, 3, H, V)."""
    flat = images.flatten(1, 2) @ matrices.mT
    return flat.unflatten(1, images.shape[1:3])


def _resize_matrix(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """PIL's bicubic weights (B, target, source) for resizing a part of each row or column.

    Args:
        start: the first pixel of the part, (B,).
        length: the number of pixels of the part, (B,).
        source: the number of pixels of the whole row or column.
        target: the number of pixels of the result.
    """
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
    """PIL's radius of the box blur for a Gaussian's standard deviation, both in pixels, (B,)."""
    variance = sigma.double().square() / BLUR_PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return (whole + part / (6 * (variance - (whole + 1).square()))).float()


def _box_matrix(radii: Tensor, size: int) -> Tensor:
    """The weights (B, size, size) of a box blur.

    A fractional radius takes a part of the next pixel; beyond an edge, the edge pixel repeats."""
    radius = radii.view(-1, 1, 1)
    whole, weight = radius.floor(), 1 / (2 * radius + 1)
    pixels = torch.arange(size, device=radii.device)
    away = torch.arange(-1, size, device=radii.device) - pixels.view(-1, 1)
    # Cumulative weights up to each pixel. The edge pixels get all weights beyond the edges.
    sums = (away + 1 + radius) * weight
    sums = torch.where(away < -whole - 1, 0, torch.where(away > whole, 1, sums))
    sums[..., 0], sums[..., -1] = 0, 1
    return sums.diff(dim=-1)
