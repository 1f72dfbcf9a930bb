"""On which devices one large kernel is faster than many small ones."""

import torch

ONE_KERNEL = ("cuda", "meta")  # device types; on the meta device, memory is planned as on a GPU


def one_kernel(device: torch.device) -> bool:
    """Whether products with LoRA pairs, and attention to a padded batch, run as one kernel for all groups there.

    On a CPU they are loops anyway. Our loop computes no padding, and does all work on rows while the cache has them.
    """
    return device.type in ONE_KERNEL
