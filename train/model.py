"""The model of a run: base, adapter and noise levels, checked against each other and the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..moe_lora import Adapter, RouterConfig, WanmoeError, attach, load_adapter
from ..moe_lora.adapter import AdapterConfig, Part, start_experts_from_base
from ..moe_lora.adapter_file import has_router, has_time_gate, read_adapter, read_adapter_info
from ..moe_lora.block_store import BlockStore
from ..moe_lora.files import file_sha256
from ..moe_lora.formats import format_of
from ..moe_lora.needs import adapter_elements, base_of, spread
from ..moe_lora.wan.config import WanConfig
from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.weight_files import weight_files
from ..moe_lora.wan.weights import dit_hash, load_dit, open_dit, read_dit_config
from .config import TrainerConfig
from .data.shards import ShardIndex
from .engine import uses_bf16
from .node_memory import node_memory
from .planner import Job, Planner, card_here
from .sliced import Sliced
from .stages import STAGES, StageSpec, stage_name
from .zero import Plan, make_plan, room

# Keys of the adapter that may change from stage to stage.
OF_A_STAGE = ("rank_dropout", "module_dropout", "expert_init")
# Keys of the router that say how loud experts are at a noise level.
_LOUDNESS = ("time_gate", "bands", "floor")


def side_configs(config: TrainerConfig) -> dict[str, TrainerConfig]:
    """The config of each model of a job by its noise expert: one, or "high" and "low" where both train."""
    model = config.model
    if model.dit_high_noise is None:
        return {model.noise_expert: config}
    optimizer = config.optimizer
    rate = optimizer.lr if optimizer.lr_high_noise is None else optimizer.lr_high_noise
    one = {"dit_high_noise": None, "adapter_high_noise": None}
    files = {"dit": model.dit_high_noise, "adapter": model.adapter_high_noise}
    high = {
        "model": model.model_copy(update=one | files | {"noise_expert": "high"}),
        "optimizer": optimizer.model_copy(update={"lr": rate}),
    }
    low = {"model": model.model_copy(update=one | {"noise_expert": "low"})}
    return {"high": config.model_copy(update=high), "low": config.model_copy(update=low)}


def wan_config_of(config: TrainerConfig) -> WanConfig:
    """The sizes of one model, from headers alone."""
    if config.model.dit is None:
        return WanConfig.preset(str(config.model.preset))
    return read_dit_config(config.model.dit)[0]


def plan_of(config: TrainerConfig, sides: Sequence[TrainerConfig], world: int, device: torch.device) -> Plan:
    """How the models of a job, by their configs, are held on this many ranks like this one."""
    bf16 = uses_bf16(config, device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    bases = [base_of(wan_config_of(one), dtype, format_of(one.model.quantised or "bf16")) for one in sides]
    pretrain = config.train.stage == "pretrain"
    if pretrain:
        trainable = sum(base.whole for base in bases) // dtype.itemsize
    else:
        trainable = adapter_elements(*_adapted(config, sides[0]))[0] * len(sides)
    return make_plan(
        config.deepspeed.zero,
        bases,
        trainable,
        world,
        room(device),
        mixed=pretrain and bf16,
        ring=config.ring.blocks,
        slots=config.ring.slots,
        shardable=config.model.quantised is None,
        beside=None if pretrain else lambda: _beside(config, sides, dtype, device),
    )


def _adapted(config: TrainerConfig, side: TrainerConfig) -> tuple[WanConfig, AdapterConfig, tuple[Part, ...]]:
    """(sizes, adapter, its parts that train) of a model."""
    adapter = side.adapter if side.model.adapter is None else read_adapter_info(side.model.adapter).adapter
    return wan_config_of(side), adapter, STAGES[stage_name(config)].trains


def _beside(
    config: TrainerConfig, sides: Sequence[TrainerConfig], dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes that a step takes beside the base and the optimizer, on the largest clips, as `wanmoe plan`
    counts them."""
    wan, adapter, parts = _adapted(config, sides[0])
    latent = max(ShardIndex(config.data.shards).buckets, key=math.prod)
    job = Job(
        stage_name(config),
        wan,
        len(sides),
        adapter,
        parts,
        latent,
        clips=config.data.batch,
        shared=config.train.sequence_parallel,
        dtype=dtype,
    )
    return Planner(job, card_here(device)).beside(config.train.checkpointing)


def open_store(
    config: TrainerConfig, plan: Plan, dtype: torch.dtype | None, device: torch.device
) -> BlockStore | None:
    """Where the blocks of the base go that stream or are quantised, laid out and not read yet; None where
    they are plain parameters. A collective: the ranks of a machine share the memory."""
    model = config.model
    if model.dit is None or not (plan.stream or model.quantised):
        return None
    opened = open_dit(model.dit)
    blocks = len(opened.dit.blocks)
    adapter = config.adapter if model.adapter is None else read_adapter_info(model.adapter).adapter
    streamed = spread(plan.stream, adapter.block_indices(blocks)[0], blocks)
    resident = set(range(blocks)) - streamed
    store = BlockStore(device, format_of(model.quantised or "bf16"), resident, node_memory)
    store.lay_out(list(opened.dit.blocks), lambda name: dtype or opened.named[name].part(0, 1).dtype)
    return store


def open_shards(
    config: TrainerConfig, dtype: torch.dtype | None, device: torch.device, say: Callable[[str], object]
) -> Sliced | None:
    """The base, left on disk for ZeRO-3 to read its shards from; None where it has to be loaded whole.

    That is so where all of it trains, and for a file that can only be read whole, of which `say` is told.
    """
    if config.model.dit is None or config.train.stage == "pretrain":
        return None
    opened = open_dit(config.model.dit)
    if opened.whole is None:
        return Sliced(opened, dtype, device)
    say(
        f"warning: {opened.whole} is in the torch format of before 1.6, which can only be read whole: every "
        "rank holds the model while it starts; save it with torch.save once more, or as safetensors"
    )
    return None


def load_model(
    config: TrainerConfig,
    dtype: torch.dtype | None = None,
    shards: Sliced | None = None,
    device: str | torch.device = "cpu",
    store: BlockStore | None = None,
) -> tuple[WanDiT, Adapter | None]:
    """(frozen DiT with its adapter attached, the adapter) as a config asks for.

    Args:
        dtype: of the base weights; None keeps that of the file. Adapters are fp32 all the same.
        shards: a base that is read later.
        device: where the base goes as it is read; adapters follow with the engine.
        store: where its blocks go instead (`open_store`).
    """
    model = config.model
    if shards is not None:
        dit = shards.dit
    elif model.dit is None:
        torch.manual_seed(config.train.seed)
        dit = WanDiT(WanConfig.preset(str(model.preset)))
    else:
        dit = load_dit(model.dit, dtype=dtype, device=device, store=store)
    if config.train.stage == "pretrain":
        return dit, None
    check_router(config)
    if model.adapter is None:
        return dit, attach(dit, config.adapter, router_config(config), seed=config.train.seed)
    adapter = load_adapter(
        model.adapter,
        dit,
        noise_expert=model.noise_expert,
        router=router_config(config),
        any_base=model.any_base,
    )
    check_same_adapter(config, adapter, model.adapter)
    return dit, adapter


def router_config(config: TrainerConfig) -> RouterConfig:
    """The router as configured, and with the stage's own keys where experts begin to train and neither the
    config nor the file of stage a says how loud they are at a noise level."""
    asked, plain = config.router, RouterConfig()
    own = STAGES[stage_name(config)].loudness
    said = not asked.model_fields_set.isdisjoint(_LOUDNESS)
    known = [asked]
    if config.model.adapter is not None:
        info = read_adapter_info(config.model.adapter)
        said |= info.stage != "a"
        known.append(info.router)
    said |= any(getattr(one, key) != getattr(plain, key) for one in known for key in _LOUDNESS)
    return asked if said else asked.model_copy(update=dict(own))


def resolved(config: TrainerConfig, adapter: Adapter) -> TrainerConfig:
    """The config with what the adapter file and the stage decided, as a run writes it down: given back, it
    asks for the same run."""
    linear = next(iter(adapter.modules.values()))
    dropouts = {"rank_dropout": linear.rank_dropout, "module_dropout": linear.module_dropout}
    return config.model_copy(
        update={"router": adapter.router_config, "adapter": adapter.config.model_copy(update=dropouts)}
    )


def ready_adapter(config: TrainerConfig, spec: StageSpec, adapter: Adapter) -> None:
    """What a stage changes in an adapter before it trains: its dropouts, and how fresh experts start."""
    asked = config.adapter
    given = asked.model_fields_set
    rank = asked.rank_dropout if "rank_dropout" in given else spec.rank_dropout
    for linear in adapter.modules.values():
        linear.rank_dropout = rank
        if "module_dropout" in given:
            linear.module_dropout = asked.module_dropout
    init = asked.expert_init if "expert_init" in given else adapter.config.expert_init
    if "experts" in spec.trains and init == "base":
        if config.model.adapter is None:
            raise WanmoeError(
                'adapter.expert_init = "base" starts the experts from a trained base: name its file under '
                "model.adapter"
            )
        start_experts_from_base(adapter)


def file_hashes(config: TrainerConfig) -> dict[str, str]:
    """sha256 of the base, the adapter and the judges that a run starts from; "" for what it has not.

    Raises:
        WanmoeError: the adapter was trained on another base, unless any_base is set.
    """
    model = config.model
    base = "" if model.dit is None else dit_hash(model.dit)
    adapter = "" if model.adapter is None else file_sha256(model.adapter)
    judges = {f"{key}_sha256": _sha256(config, key) for key in ("classifier", "lpips")}
    if model.adapter is not None and not model.any_base:
        trained_on = read_adapter(model.adapter)[0].base_sha256
        if trained_on and trained_on != base:
            raise WanmoeError(
                f"{model.adapter}: it was trained on base {trained_on[:12]}, {model.dit} is {base[:12]}; "
                "set model.any_base = true to go on all the same"
            )
    return {"base_sha256": base, "adapter_sha256": adapter, **judges}


def _sha256(config: TrainerConfig, key: str) -> str:
    path: Path | None = getattr(config.objective, key)
    if path is not None and not path.is_file():
        made = "; `wanmoe train-classifier` makes one" if key == "classifier" else ""
        raise WanmoeError(f"objective.{key}: {path} does not exist{made}")
    return "" if path is None else file_sha256(path)


def local_files(config: TrainerConfig) -> dict[str, Any]:
    """What a rank can say quickly of its own copies: size of the base, sha256 of the adapter."""
    model = config.model
    size = 0 if model.dit is None else sum(file.stat().st_size for file in weight_files(model.dit))
    return {
        "the size of model.dit": size,
        "model.adapter": "" if model.adapter is None else file_sha256(model.adapter),
        "objective.classifier": _sha256(config, "classifier"),
        "objective.lpips": _sha256(config, "lpips"),
    }


def check_router(config: TrainerConfig) -> None:
    """A learned router must come from the file or be trained by this stage: a random one must never route."""
    spec = STAGES[stage_name(config)]
    trains = "router" in spec.trains
    in_file = config.model.adapter is not None and has_router(read_adapter(config.model.adapter)[1])
    if trains and config.router.mode != "learned" and not in_file:
        raise WanmoeError("router.mode = 'rule' but a router is to be trained; set router.mode = 'learned'")
    if config.router.mode == "learned" and not trains and not in_file:
        raise WanmoeError(
            f"router.mode = 'learned' but stage {config.train.stage} trains no router and its adapter has "
            "none; leave the key out, or set train.train_router = true in stage b"
        )
    has_gate = config.model.adapter is not None and has_time_gate(read_adapter(config.model.adapter)[1])
    if config.router.time_gate == "learned" and "experts" not in spec.trains and not has_gate:
        raise WanmoeError(
            f"router.time_gate = 'learned' but stage {config.train.stage} trains no experts and its adapter "
            "has no such gate; set it in stage b"
        )


def check_same_adapter(config: TrainerConfig, adapter: Adapter, path: Path) -> None:
    """A key that the config sets must agree with the adapter file that the stage starts from."""
    for key in config.adapter.model_fields_set:
        asked, found = getattr(config.adapter, key), getattr(adapter.config, key)
        if asked != found and key not in OF_A_STAGE:
            raise WanmoeError(f"adapter.{key} = {asked} but {path} has {found}; drop the key or start afresh")


def check_shards_fit(dit: WanDiT, shards: ShardIndex) -> None:
    """Shards encoded for another text encoder, codec or task are refused before the first step."""
    if shards.manifest["normalised"] is not True:
        raise WanmoeError(f"{shards.root}: the latents are not normalised; prepare the clips again")
    used = [shards.manifest[part] for part in ("codec", "text_encoder")]
    stand_ins = [part["name"] for part in used if part["stand_in"]]
    if stand_ins and dit.config.is_released:
        raise WanmoeError(
            f"{shards.root}: encoded with the stand-in {stand_ins[0]!r}, which this model does not know; "
            "prepare the clips with Wan's own VAE and text encoder"
        )
    if shards.manifest["text_dim"] != dit.config.text_dim:
        raise WanmoeError(
            f"{shards.root}: text embeddings are {shards.manifest['text_dim']} wide, the model reads "
            f"{dit.config.text_dim}; prepare the clips with this model's text encoder"
        )
    if (dit.config.task == "i2v") != shards.manifest["image_latents"]:
        raise WanmoeError(f"{shards.root}: prepared for another task than {dit.config.task}; prepare again")


def side_of(noise_expert: str, boundary: float) -> tuple[float, float]:
    """Noise levels that a model serves: "high", "low" or "both" sides of the boundary."""
    return {"high": (boundary, 1.0), "low": (0.0, boundary), "both": (0.0, 1.0)}[noise_expert]


def side_range(config: TrainerConfig, spec: StageSpec, boundary: float) -> tuple[float, float]:
    """Noise levels that are trained: the configured (or the stage's) range within the model's side."""
    side, asked = side_of(config.model.noise_expert, boundary), config.objective.t_range or spec.t_range
    low, high = max(side[0], asked[0]), min(side[1], asked[1])
    if not low < high:
        raise WanmoeError(
            f"objective.t_range {list(asked)} leaves nothing of [{side[0]}, {side[1]}], the side of the "
            f"{config.model.noise_expert} noise expert"
        )
    return low, high
