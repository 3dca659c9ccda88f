"""A UNet in the manner of Stable Diffusion, smaller: self-attention over pixels, cross-attention to a text.

python examples/unet.py
"""

import sys

import torch
from shared import show

try:
    from diffusers import UNet2DConditionModel
except ImportError:
    sys.exit("This example needs diffusers: pip install diffusers")


def build() -> torch.nn.Module:
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def inputs() -> dict[str, torch.Tensor]:
    text = torch.randn(1, 77, 256)
    return {"sample": torch.randn(1, 4, 32, 32), "timestep": torch.tensor([500]), "encoder_hidden_states": text}


if __name__ == "__main__":
    sys.exit(show("UNet", build, inputs, expected=14))
