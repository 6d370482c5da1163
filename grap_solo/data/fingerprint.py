"""A short description of a dataset by which its images are known again elsewhere."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np

from grap_solo.data.images import Images

SIZES = 1000
"""How many images' stored sizes are looked at: each may be a request to a file server."""


def fingerprint(images: Images, root: str) -> dict[str, Any]:
    """Describes images without reading them.

    Args:
        images: the images.
        root: the folder or file that they come from; names of files count from there.

    Returns:
        The number of ``images``, the number of ``classes`` that their source declares, and a
        ``digest`` of all labels and downstream targets, of all names of files, and of the stored
        sizes of 1,000 images spread evenly. The same images in another folder have the same
        fingerprint.
    """
    count, whole = len(images), hashlib.sha256()
    whole.update(np.ascontiguousarray(images.targets, dtype="<i8").tobytes())
    for name, each in sorted((images.values or {}).items()):
        whole.update(f"{name}\0".encode())
        whole.update(np.ascontiguousarray(each).tobytes())
    for index in range(count):
        file = images.file_of(index)
        if file is not None:
            whole.update(f"{os.path.relpath(file, root)}\0".encode(errors="surrogateescape"))
    for index in np.unique(np.linspace(0, count - 1, min(count, SIZES)).astype(int)).tolist():
        whole.update(f"{images.stored_size(index)}\0".encode())
    classes = None if images.classes is None else int(images.classes)
    return {"images": count, "classes": classes, "digest": whole.hexdigest()[:32]}
