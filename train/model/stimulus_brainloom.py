"""What is on the screen: frames in the order of time, cut into space-time patches.

In: standardised pixels (B, F, H, W), when each frame came on, which are visible. Out: contents, places (B, F * M, D).

Shapes: B batch, F frames, M patches of a frame, D hidden_size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_brainloom import BrainloomConfig


def in_order_of_time(pixels_BFHW: Tensor, time_s_BF: Tensor, mask_BF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Frames, times and mask by time, those that are not visible last: the order they came in says nothing."""
    order_BF = torch.where(mask_BF, time_s_BF.float(), torch.inf).argsort(dim=1, stable=True)
    pixels = pixels_BFHW.gather(1, order_BF[..., None, None].expand_as(pixels_BFHW))
    return pixels, time_s_BF.gather(1, order_BF), mask_BF.gather(1, order_BF)


class BrainloomPatches(nn.Module):
    """Stimulus frames as space-time patches: a content that is read, and a place on the screen by which it is found.

    A patch holds its part of the last `frames_per_patch` frames, so that what moves and what lingers is in one content.
    """

    def __init__(self, config: BrainloomConfig) -> None:
        super().__init__()
        self.patch_size, self.num_lags = config.patch_size, config.frames_per_patch
        self.pixel_proj = nn.Linear(self.num_lags * config.patch_size**2, 2 * config.hidden_size)
        self.out_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.position_embed = nn.Parameter(torch.zeros(config.num_patches, config.hidden_size))

    def forward(self, pixels_BFHW: Tensor, frame_mask_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Contents and places, both (B, F * M, D); masked frames are zeroed first."""
        pixels = torch.where(frame_mask_BF[..., None, None], pixels_BFHW.to(self.pixel_proj.weight.dtype), 0.0)
        side = self.patch_size
        patches = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side)).transpose(3, 4).flatten(4).flatten(2, 3)
        num_frames = patches.shape[1]
        lagged = [F.pad(patches, (0, 0, 0, 0, lag, 0))[:, :num_frames] for lag in range(self.num_lags)]
        content: Tensor = self.out_proj(F.silu(self.pixel_proj(torch.cat(lagged, dim=-1))))
        return content.flatten(1, 2), self.position_embed.expand_as(content).flatten(1, 2)
