"""Caches of musubi-tuner, written here by their documented layout, become shards without a bit changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import SURGICAL, ExpertSet
from wanmoe.moe_lora.wan.text import HashTextEncoder
from wanmoe.train.data.clips import Clip
from wanmoe.train.data.musubi import import_caches
from wanmoe.train.data.shards import Sample, ShardDataset
from wanmoe.train.data.verify import verify_shards

EXPERTS = ExpertSet(SURGICAL)
WIDTH = 16


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def write_latent(
    folder: Path,
    stem: str,
    *,
    frames: int = 9,
    first: int = 0,
    grid: tuple[int, int] = (4, 6),
    dtype: torch.dtype = torch.bfloat16,
    image: bool = False,
    seed: int = 0,
    architecture: str = "wan",
    video: str = "0854x0480",
    **edits: Tensor | None,
) -> Path:
    """What `save_latent_cache_wan` writes; the size in the name is the video's own (W x H)."""
    generator = torch.Generator().manual_seed(seed)
    size = ((frames - 1) // 4 + 1, *grid)
    name = "x".join(map(str, size))
    latent = torch.randn(16, *size, generator=generator).to(dtype)
    tensors: dict[str, Tensor] = {f"latents_{name}_{dtype_name(latent)}": latent}
    if image:
        condition = torch.randn(20, *size, generator=generator).to(dtype)
        tensors[f"latents_image_{name}_{dtype_name(latent)}"] = condition
    for key, value in edits.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    path = folder / f"{stem}_{first:05d}-{frames:03d}_{video}_wan.safetensors"
    metadata = {"architecture": architecture, "width": "854", "height": "480", "frame_count": str(frames)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata | {"format_version": "1.0.1"})
    return path


def write_text(
    folder: Path,
    stem: str,
    caption: str | None = "The hook cuts.",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    architecture: str = "wan",
    width: int = WIDTH,
) -> Path:
    """What `save_text_encoder_output_cache_wan` writes."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(3 + seed % 4, width, generator=generator).to(dtype)
    path = folder / f"{stem}_wan_te.safetensors"
    metadata = {"architecture": architecture, "format_version": "1.0.1"}
    metadata |= {} if caption is None else {"caption1": caption}
    save_file({f"varlen_t5_{dtype_name(context)}": context}, path, metadata)
    return path


def write_pair(folder: Path, stem: str, caption: str = "The hook cuts.", **options: Any) -> Path:
    path = write_latent(folder, stem, **options)
    write_text(folder, stem, caption, seed=options.get("seed", 0))
    return path


def run(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    return import_caches(
        folder, out, **{"experts": EXPERTS, "val_fraction": 0.0, "progress": False, **options}
    )


def samples(out: Path, split: str = "train") -> dict[str, Sample]:
    data = ShardDataset(out, split)
    return {data[index].meta["cache"]["name"]: data[index] for index in range(len(data))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_and_texts_stay_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    for seed, stem in enumerate(("cholec02_0046_part1", "b")):
        write_latent(tmp_path / "c", stem, seed=seed, dtype=dtype)
        write_text(tmp_path / "c", stem, f"The hook {seed}.", seed=seed, dtype=dtype)
    manifest = run(tmp_path / "c", tmp_path / "s")
    assert manifest["codec"] == {"name": "wan2.1 (musubi cache)", "fingerprint": "unknown", "stand_in": False}
    assert manifest["normalised"] is True and manifest["task"] == "t2v" and manifest["notes"] == []
    found = samples(tmp_path / "s")["cholec02_0046_part1_00000-009_0854x0480_wan.safetensors"]
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(16, 3, 4, 6, generator=generator).to(dtype)
    context = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert found.latent.dtype == found.context.dtype == dtype
    assert torch.equal(found.latent, latent) and torch.equal(found.context, context)
    assert found.caption == "The hook 0." and found.meta["source"] == "cholec02"
    assert (found.meta["size"], found.meta["source_size"], found.meta["n_frames"]) == (
        [32, 48],
        [480, 854],
        9,
    )
    assert found.meta["fps"] == 16 and found.image_latent is None and found.roi is None
    assert verify_shards(tmp_path / "s").ok


def test_the_condition_of_i2v_comes_along_and_wide_values_are_noted(tmp_path: Path) -> None:
    path = write_pair(tmp_path / "c", "a", image=True, dtype=torch.float32, seed=3)
    manifest = run(tmp_path / "c", tmp_path / "s")
    assert manifest["task"] == "i2v" and manifest["notes"] == ["latents of 32 bits are stored as float16"]
    sample = samples(tmp_path / "s")[path.name]
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(sample.latent, torch.randn(16, 3, 4, 6, generator=generator).half())
    assert sample.image_latent is not None
    assert torch.equal(sample.image_latent, torch.randn(20, 3, 4, 6, generator=generator).half())


def test_labels_come_from_the_caption_and_its_tools_or_from_the_list(tmp_path: Path) -> None:
    captions = {
        "a": "电凝钩烧灼",
        "b": "Work [Tools in: scissors, grasper]",
        "c": "The camera moves.",
        "d": "hook",
    }
    for seed, (stem, caption) in enumerate(captions.items()):
        write_pair(tmp_path / "c", stem, caption, seed=seed)
    run(tmp_path / "c", tmp_path / "s")
    found = {sample.meta["source"]: sample for sample in samples(tmp_path / "s").values()}
    assert {source: sample.instruments for source, sample in found.items()} == {
        "a": (("Hook/Electrocautery", 1.0),),
        "b": (("Scissors", 0.5), ("Other", 0.5)),
        "c": (),
        "d": (("Hook/Electrocautery", 1.0),),
    }
    assert found["b"].caption == captions["b"], "the text was encoded with the brackets"
    base = {"caption": "x", "id": "i", "origin": "clips.jsonl:1"}
    clips = [
        Clip(Path("videos/c.mp4"), source="v1", instruments=(("suction", 1.0),), licence="CC0", **base),
        Clip(Path("videos/d.mp4"), source="v1", instrument_label=3, split="val", **base),
        Clip(Path("videos/never.mp4"), source="v2", **base),
    ]
    manifest = run(tmp_path / "c", tmp_path / "t", clips=clips)
    train, val = (samples(tmp_path / "t", split) for split in ("train", "val"))
    (held,) = val.values()
    assert held.instruments == (("Other", 1.0),) and held.meta["source"] == "v1" and held.caption == "hook"
    labelled = next(sample for name, sample in train.items() if name.startswith("c_"))
    assert labelled.instruments == (("Suction", 1.0),) and labelled.meta["licence"] == "CC0"
    assert labelled.caption == "The camera moves."
    assert manifest["notes"] == [
        "2 caches have no line in the clip list; their labels come from their captions"
    ]


def test_two_lines_that_label_one_stem_differently_are_both_named(tmp_path: Path) -> None:
    write_pair(tmp_path / "c", "a")
    same = Clip(Path("x/a.mp4"), "hook", "i", "v", "clips.jsonl:1")
    other = Clip(Path("y/a.mp4"), "scissors", "i", "v", "clips.jsonl:2")
    with pytest.raises(WanmoeError, match=r"clips\.jsonl:1 and clips\.jsonl:2 describe a differently"):
        run(tmp_path / "c", tmp_path / "s", clips=[same, other])
    run(tmp_path / "c", tmp_path / "s", clips=[same, same])


def test_windows_of_one_video_stay_on_one_side_of_the_split(tmp_path: Path) -> None:
    for number in range(10):
        for first in (0, 9, 18):
            write_latent(tmp_path / "c", f"v{number}", first=first, seed=30 * number + first)
        write_text(tmp_path / "c", f"v{number}", seed=number)
    manifest = run(tmp_path / "c", tmp_path / "s", val_fraction=0.2)
    assert manifest["n_samples"] == {"train": 24, "val": 6} and manifest["n_texts"] <= 10
    report = verify_shards(tmp_path / "s")
    assert report.ok and not report.shared_sources
    keys = [key for split in ("train", "val") for key in ShardDataset(tmp_path / "s", split).keys]
    assert len(set(keys)) == 30 and any("-w018_" in key for key in keys)


def test_equal_names_in_two_folders_are_two_samples_and_equal_files_one(tmp_path: Path) -> None:
    write_pair(tmp_path / "c" / "x", "a", seed=1)
    write_pair(tmp_path / "c" / "y", "a", seed=2)
    write_pair(tmp_path / "c" / "z", "a", seed=1)
    manifest = run(tmp_path / "c", tmp_path / "s")
    assert manifest["n_samples"] == {"train": 2} and manifest["dropped"] == {"the same cache twice": 1}


def test_buckets_follow_the_latents_and_a_rebuild_is_identical(tmp_path: Path) -> None:
    for name in ("here", "there"):
        folder = tmp_path / name / "c"
        write_pair(folder, "a", frames=9, grid=(4, 6), seed=1)
        write_pair(folder, "b", frames=17, grid=(6, 4), seed=2, video="0480x0854")
        write_pair(folder, "c_00000-009_x", frames=1001, grid=(2, 2), seed=3, video="12345x99999")
        run(folder, tmp_path / name / "s")
    assert list(ShardDataset(tmp_path / "here" / "s").buckets) == [(3, 4, 6), (5, 6, 4), (251, 2, 2)]
    for path in (tmp_path / "here" / "s").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / "s" / path.name).read_bytes(), path.name


def test_other_models_and_single_images_are_dropped_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    path = write_pair(folder, "a")
    (folder / "b_00000-009_0854x0480_hv.safetensors").write_bytes(path.read_bytes())
    (folder / "d_0854x0480_wan.safetensors").write_bytes(path.read_bytes())
    write_pair(folder, "e", frames=1)
    manifest = run(folder, tmp_path / "s")
    assert manifest["n_samples"] == {"train": 1}
    assert manifest["dropped"] == {"a cache of a single image": 2, "a cache of another model": 1}
    path.unlink()
    with pytest.raises(WanmoeError, match="no cache of a Wan video.*2 x a cache of a single image"):
        run(folder, tmp_path / "t")
    with pytest.raises(WanmoeError, match=r"no \.safetensors file; they are made by wan_cache_latents"):
        (tmp_path / "empty").mkdir()
        run(tmp_path / "empty", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_the_empty_caption_and_fingerprints_come_from_weights_that_are_given(tmp_path: Path) -> None:
    write_pair(tmp_path / "c", "a")
    run(tmp_path / "c", tmp_path / "s")
    assert ShardDataset(tmp_path / "s").null_context is None
    encoder = HashTextEncoder(dim=WIDTH)
    manifest = run(tmp_path / "c", tmp_path / "t", text_encoder=encoder)
    assert manifest["text_encoder"]["fingerprint"] == encoder.fingerprint
    null = ShardDataset(tmp_path / "t").null_context
    assert null is not None and null.shape == (1, WIDTH)
    with pytest.raises(WanmoeError, match="--text: its embeddings are 8 wide, those of the caches 16"):
        run(tmp_path / "c", tmp_path / "u", text_encoder=HashTextEncoder(dim=8))
    assert not (tmp_path / "u").exists()


LATENT = "latents_3x4x6_bfloat16"
NAN = torch.full((16, 3, 4, 6), float("nan")).bfloat16()
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "other frames": ({"frames": 13, LATENT: NAN, "latents_4x4x6_bfloat16": None}, "is not 13 frames"),
    "not 4 n + 1": ({"frames": 10}, "is not 10 frames"),
    "name of the tensor": ({LATENT: None, "latents_3x6x4_bfloat16": NAN}, "unlike its name"),
    "dtype of the tensor": ({LATENT: None, "latents_3x4x6_float16": NAN}, "unlike its name"),
    "channels": ({LATENT: torch.zeros(48, 3, 4, 6).bfloat16()}, r"is \[48, 3, 4, 6\]"),
    "no latent": ({LATENT: None, "other": NAN}, "has 0 tensors named like latents"),
    "condition": ({"latents_image_3x4x6_bfloat16": NAN}, "not \\[20, 3, 4, 6\\]"),
    "architecture": ({"architecture": "wan21"}, "architecture 'wan21', not 'wan'"),
    "NaN": ({LATENT: NAN}, "holds NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_latent_file_is_named(tmp_path: Path, name: str) -> None:
    edits, cause = WRONG[name]
    write_pair(tmp_path / "c", "good", seed=1)
    path = write_pair(tmp_path / "c", "bad", **edits)
    with pytest.raises(WanmoeError, match=cause) as caught:
        run(tmp_path / "c", tmp_path / "s")
    assert str(path) in str(caught.value) and "good" not in str(caught.value)
    assert "1 caches cannot be used" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_every_wrong_file_is_named_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_pair(folder, "a_good_one", image=True)
    wrong = {
        write_latent(folder, "without", seed=1, image=True): "its text without_wan_te.safetensors is missing",
        write_pair(folder, "plain", seed=2): "has no latents_image, as others have",
        write_pair(folder, "nan", seed=3, image=True, **{LATENT: NAN}): "holds NaN",
        write_pair(folder, "cut", seed=4, image=True): "not a safetensors file",
    }
    for stem, options, cause in (
        ("mute", {"caption": None}, "have no caption1"),
        ("alien", {"architecture": "hunyuan_video"}, "architecture 'hunyuan_video'"),
        ("small", {"width": 8}, "the text is 8 wide, 16 in others"),
    ):
        write_latent(folder, stem, seed=5, image=True)
        wrong[write_text(folder, stem, **options)] = cause  # type: ignore[arg-type]
    cut = folder / "cut_00000-009_0854x0480_wan.safetensors"
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(WanmoeError) as caught:
        run(folder, tmp_path / "s")
    told = str(caught.value)
    assert "7 caches cannot be used" in told and "\n" not in told and "a_good_one" not in told
    for path, cause in wrong.items():
        assert f"{path}: " in told and cause in told.split(f"{path}: ")[1].split(f"; {folder}")[0], path
    assert not (tmp_path / "s").exists()
