"""The sections of a training config, one docstring per field; composed and read from TOML by
`wanmoe.launch.config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..moe_lora import AdapterConfig, RouterConfig

Stage = Literal["pretrain", "a", "b", "c"]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are validated."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")


class ModelConfig(Section):
    """Section `model`: the frozen base and the adapter that a stage starts from."""

    preset: str | None = None
    """Start from random weights of this preset (`tiny`, ...); for stage pretrain."""
    dit: Path | None = None
    """Base weights: safetensors file or folder (original, diffusers or ComfyUI names)."""
    noise_expert: Literal["high", "low", "both"] = "both"
    """Which side of the boundary this model serves: its t is drawn there alone. both: one model for all t."""
    adapter: Path | None = None
    """Adapter file that this stage starts from (stage b: the file of a; stage c: the file of b)."""
    any_base: bool = False
    """Take the adapter although it was trained on another base, task or noise expert."""

    @model_validator(mode="after")
    def _one_base(self) -> ModelConfig:
        if (self.preset is None) == (self.dit is None):
            raise ValueError("give exactly one of model.dit (weights) and model.preset (random weights)")
        return self


class DataConfig(Section):
    """Section `data`: the shards and how they are read."""

    shards: str
    """Folder written by `wanmoe prepare`, or its URL (`https://...`, `s3://...`)."""
    reader: Literal["indexed", "streaming"] = "indexed"
    """indexed: every sample by its place in the shard, in an order that depends on the seed alone. streaming:
    shard after shard, for object stores; the order also depends on the ranks and workers."""
    batch: int = Field(1, ge=1)
    """Clips per rank and forward."""
    val_batch: int | None = Field(None, ge=1)
    """Held-out clips per rank and forward; default: as `batch`. They need no graph, so more of them fit."""
    workers: int = Field(2, ge=0)
    """Reader processes per rank, which read ahead; 0 reads in the training process."""
    max_bad_samples: int = Field(10, ge=0)
    """Samples that cannot be read are named and replaced by others; training stops when there are more of
    them than this."""
    balanced: bool = True
    """In stages b and c, draw every instrument equally often however many clips it has."""
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    """Probability that a clip is seen without its caption, which guidance needs later."""


class ObjectiveConfig(Section):
    """Section `objective`: where t is drawn and what the losses weigh."""

    t_sampling: Literal["uniform", "logit_normal"] = "uniform"
    t_shift: float = Field(1.0, gt=0)
    """t = s u / (1 + (s - 1) u): above 1 draws more noise."""
    t_mean: float = 0.0
    t_std: float = Field(1.0, gt=0)
    """Of the normal under logit_normal."""
    t_range: tuple[float, float] | None = None
    """Slice of the distribution that is drawn from; default [0, 1], in stage b [0.2, 1]."""
    teacher_kl: float = Field(1.0, ge=0)
    """Weight of KL(rule gates || router) while a router trains."""

    @model_validator(mode="after")
    def _range(self) -> ObjectiveConfig:
        if self.t_range is not None and not 0 <= self.t_range[0] < self.t_range[1] <= 1:
            raise ValueError(f"objective.t_range must rise within [0, 1], got {list(self.t_range)}")
        return self


class OptimizerConfig(Section):
    """Section `optimizer`: AdamW and its schedule."""

    lr: float | None = Field(None, gt=0)
    """Default by stage: pretrain 1e-3, a 1e-4, b 5e-5, c 1e-3."""
    router_lr: float | None = Field(None, gt=0)
    """Learning rate of a router that trains beside the experts in stage b; default 1e-4."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    schedule: Literal["constant", "cosine"] | None = None
    """Default by stage: a constant, others cosine to zero."""
    warmup_steps: int = Field(10, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)


class TrainConfig(Section):
    """Section `train`: what is trained, for how long, and where results go."""

    stage: Stage
    """pretrain: all parameters of a small model; a: base adapter; b: experts; c: router."""
    run: Path
    """Run folder: config, adapter, resume state, metrics."""
    steps: int = Field(1000, ge=1)
    accumulation: int = Field(1, ge=1)
    """Forwards per optimizer step and rank."""
    seed: int = Field(0, ge=0)
    train_router: bool = False
    """In stage b, train a learned router together with the experts, taught by the labels."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on accelerators, fp32 on the CPU. Masters, moments and gates are fp32 in both."""
    checkpointing: bool = False
    """Recompute the blocks that carry a graph in the backward."""
    log_every: int = Field(10, ge=1)
    val_every: int = Field(0, ge=0)
    """Steps between validations; 0: only at the start and at the end."""
    save_every: int = Field(0, ge=0)
    """Steps between resume states; 0: only when stopped and at the end."""
    keep: int = Field(2, ge=1)
    """Resume states kept."""
    resume: bool = True
    """Continue from the run folder's newest valid resume state, if there is one."""
    max_bad_steps: int = Field(5, ge=1)
    """Stop after this many steps in a row with a non-finite loss; each is skipped on all ranks."""


class DeepSpeedConfig(Section):
    """Section `deepspeed`: any key of DeepSpeed's own config; ZeRO stage 3 is what the engine is built on."""

    config: dict[str, Any] = Field(default_factory=dict)
    """Merged over the settings that are derived from the model."""


class TrackingConfig(Section):
    """Section `tracking`: MLflow."""

    enabled: bool = True
    uri: str | None = None
    """MLflow tracking URI; default: sqlite file `mlflow.db` beside the run folders."""
    experiment: str = "wanmoe"
    name: str | None = None
    """Name of the MLflow run; default: name of the run folder."""


class TrainerConfig(Section):
    """Everything that training reads."""

    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    router: RouterConfig = RouterConfig()
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    tracking: TrackingConfig = TrackingConfig()
