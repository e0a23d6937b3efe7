"""Backward flow between the latent frames of a window, and where it holds.

Letters: F, H, W frames, height, width of the window in pixels; f the latent frames, (F - 1) / 4 + 1.

Between latent frames the flow (`moe_lora/motion.py`) is taken over four frames at once. Measured at 16 fps on
what is seen in both (mean error in grey levels warped / as it stood; share hidden; seconds of one core):
endoscopy 832x480x81 4.7 / 18.8, 22 %, 0.6 s; signed gestures 640x480x36 1.8 / 3.3, 11 %, 0.2 s; street
640x272x81, full size, 2.3 / 17.8, 50 %, 1.1 s. Four flows of one frame in a row, or full size, cost four
times as much and warp latents as well.
"""

import numpy as np
import torch
from torch import Tensor

from ...moe_lora.motion import Floats, clip_flow
from ...moe_lora.wan.codec import SPACE_STRIDE, TIME_STRIDE, latent_shape


def latent_flow(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Backward flow between the latent frames of a window, and where it holds.

    Returns flow float16 [f - 1, 2, H / 8, W / 8], (x, y) in latent pixels, and visible uint8 [f - 1, H / 8,
    W / 8], 255 where most of the cell is seen in both. Latent frame k stands for pixel frame 4 k: what is at
    p in latent frame k was at p + flow[k - 1] in latent frame k - 1, so sampling the earlier frame there
    gives the later one. `pictures` as for `clip_flow`; `WanmoeError` where the size has no latent.
    """
    latent_shape(*pictures.shape[:3])
    flow = clip_flow(pictures, TIME_STRIDE)
    side = SPACE_STRIDE // flow.scale
    seen = _cells(flow.visible[:, None].astype(np.float32), side)
    mean = _cells(flow.backward, side) / SPACE_STRIDE
    visible = np.where(seen[:, 0] >= 0.5, 255, 0).astype(np.uint8)
    return torch.from_numpy(mean.astype(np.float16)), torch.from_numpy(visible)


def _cells(grid: Floats, side: int) -> Floats:
    """Means [n, c, h / side, w / side] over squares of a grid [n, c, h, w]."""
    n, c, height, width = grid.shape
    return np.asarray(
        grid.reshape(n, c, height // side, side, width // side, side).mean((3, 5)), dtype=np.float32
    )
