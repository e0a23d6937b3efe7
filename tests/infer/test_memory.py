"""What a generation is said to take on a card, and the table of it in the docs."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from wanmoe.infer.memory import needs
from wanmoe.moe_lora.adapter import attach
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT

PAGE = Path(__file__).resolve().parents[2] / "docs" / "generate.md"
CLIPS = [((256, 256), 81), ((512, 512), 81), ((480, 832), 81), ((720, 1280), 81)]


def weights_of_a14b():
    with torch.device("meta"):
        dit = WanDiT(WanConfig.preset("t2v-A14B")).to(torch.bfloat16)
        attach(dit)
    return sum(p.numel() * p.itemsize for p in dit.parameters())


def weights_of_vae():
    with torch.device("meta"):
        return sum(p.numel() * p.itemsize for p in AutoencoderKLWan().parameters())


def test_the_table_in_the_docs_is_what_the_model_says():
    weights, codec = weights_of_a14b(), weights_of_vae()
    lines = ["| clip | weights of one side | VAE | a step | a step, both passes at once | decoding | peak |"]
    lines.append("|---|---|---|---|---|---|---|")
    for size, frames in CLIPS:
        one, two = (
            needs(WanConfig.preset("t2v-A14B"), weights, codec, frames, size, clips, 2) for clips in (1, 2)
        )
        parts = (one.weights, one.codec, one.denoise, two.denoise, one.decode, one.peak)
        cells = " | ".join(f"{part / 1e9:.1f}" for part in parts)
        lines.append(f"| {size[0]}x{size[1]}x{frames} | {cells} |")
    shown = PAGE.read_text(encoding="utf-8").split("<!-- memory -->")[1].split("<!-- /memory -->")[0].strip()
    assert shown == "\n".join(lines)


def test_needs_grow_with_what_they_depend_on():
    config = WanConfig.preset("t2v-1.3B")
    small = needs(config, 10, 5, 17, (64, 64), 1, 2)
    assert needs(config, 10, 5, 17, (64, 64), 2, 2).denoise == 2 * small.denoise
    assert needs(config, 10, 5, 17, (128, 64), 1, 2).denoise == 2 * small.denoise
    assert needs(config, 10, 5, 17, (128, 64), 1, 2).decode == 2 * small.decode
    assert needs(config, 10, 5, 17, (64, 64), 1, 4).denoise == 2 * small.denoise
    assert small.peak > small.weights + 5 + max(small.denoise, small.decode)
