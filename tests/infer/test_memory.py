"""What a generation is said to take on a card, and the tables of it in the docs."""

from pathlib import Path

import pytest
import torch

from wanmoe.infer.memory import needs
from wanmoe.moe_lora.adapter import AdapterConfig, attach
from wanmoe.moe_lora.formats import FORMATS
from wanmoe.moe_lora.needs import CONTEXT, activations, base_of
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.train.planner import VAE, Job, Planner, card_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "generate.md"
SIZES = [(256, 256), (512, 512), (480, 832), (720, 1280)]
A14B = WanConfig.preset("t2v-A14B")
SMALL = WanConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=8, text_dim=64, text_len=16, freq_dim=32)
CLIP = {"frames": 9, "size": (64, 64)}


def table(mark):
    return PAGE.read_text(encoding="utf-8").split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()


def adapter_bytes(config, adapter):
    with torch.device("meta"):
        dit = WanDiT(config)
    return sum(p.nbytes for p in attach(dit, adapter, device="meta").parameters().values())


def test_the_table_of_what_there_is_is_what_is_counted():
    lines = [
        "| clip | weights of one side | a step | a step, both passes at once | VAE and decoding | peak |"
    ]
    lines.append("|---|---|---|---|---|---|")
    adapter, base = AdapterConfig(), base_of(A14B, torch.bfloat16)
    given = {"adapters": 2 * adapter_bytes(A14B, adapter), "codec": VAE, "swapped": True, "frames": 81}
    for size in SIZES:
        one, two = (needs(A14B, adapter, [base] * 2, size=size, clips=n, **given) for n in (1, 2))
        cells = (one.comes, one.denoise, two.denoise, one.decode, one.peak)
        lines.append(
            f"| {size[0]}x{size[1]}x81 | " + " | ".join(f"{cell / 1e9:.1f}" for cell in cells) + " |"
        )
    assert table("memory") == "\n".join(lines)


def test_the_table_of_what_streams_is_what_the_planner_proposes():
    lines = ["| clip | 16 GB | 24 GB | 40 GB | 80 GB |", "|---|---|---|---|---|"]
    for size in SIZES[:3]:
        cells = []
        latent = (21, size[0] // 8, size[1] // 8)
        for card in ("16GB", "24GB", "40GB", "80GB"):
            job = Job("t2v-A14B", A14B, 2, AdapterConfig(), (), latent, forwards=2)
            chosen = Planner(job, card_of(card)).fit((None,))[0]
            how = "all on the card"
            if chosen.settings.stream:
                how = f"{chosen.settings.stream} of 40 stream"
            elif chosen.settings.park:
                how = "one DiT at a time"
            cells.append(f"{how}; {chosen.peak / 1e9:.1f} GB, {chosen.seconds:.1f} s a step")
        lines.append(f"| {size[0]}x{size[1]}x81 | " + " | ".join(cells) + " |")
    assert table("streams") == "\n".join(lines)


def test_needs_are_weights_step_and_decoder():
    base, adapter = base_of(SMALL, torch.float32), AdapterConfig(blocks=4, ffn_blocks=2)
    given = {"adapters": 1000, "codec": 5000, "dtype": torch.float32, **CLIP}
    one = needs(SMALL, adapter, [base], **given)
    assert one.stays == base.whole + 1000 and one.comes == 0
    step = activations(SMALL, adapter, (), (3, 8, 8), dtype=torch.float32)
    assert one.denoise == step.peak and one.decode > 5000
    assert one.peak == one.stays + max(one.denoise, one.decode) + CONTEXT
    swapped = needs(SMALL, adapter, [base, base], swapped=True, **given)
    assert (swapped.stays, swapped.comes) == (0, base.whole + 500)
    assert needs(SMALL, None, [base], clips=2, **given).denoise > needs(SMALL, None, [base], **given).denoise


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_what_streams_is_not_on_the_card(form):
    base = base_of(SMALL, torch.bfloat16, FORMATS[form])
    found = needs(SMALL, None, [base, base], adapters=0, codec=0, stream=5, **CLIP)
    assert found.stays == 2 * (base.rest + 3 * base.block) + 2 * base.block + base.unpacked


def test_it_is_said_in_one_line():
    base = base_of(A14B, torch.bfloat16)
    given = {"adapters": 0, "codec": VAE, "frames": 5, "size": (256, 256)}
    said = needs(A14B, None, [base], **given).describe()
    assert said == "needed on the card 30.5 GB: weights 28.6, then 0.1 to denoise and 1.1 to decode"
    both = needs(A14B, None, [base, base], swapped=True, **given)
    assert "weights of one side 28.6, then" in both.describe()
