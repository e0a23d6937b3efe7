"""The sections of a training config, one docstring per field; composed and read from TOML by
`wanmoe.launch.config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

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
    """Adapter file that this stage starts from (stage c: the file of b; stage b: that of a, if
    any)."""
    dit_high_noise: Path | None = None
    """Weights of the high-noise model. With them both models train in one job, each with its own adapter,
    and `dit` is the low-noise one."""
    adapter_high_noise: Path | None = None
    """As `adapter`, for the high-noise model of such a job."""
    any_base: bool = False
    """Take the adapter although it was trained on another base, task or noise expert."""
    quantised: Literal["fp8", "int8", "nf4"] | None = None
    """How the large weights of the frozen base are held; they are unpacked to what is computed in when their
    block's turn comes, and the adapter on them is exact. Default: as they are computed in."""

    @model_validator(mode="after")
    def _one_base(self) -> ModelConfig:
        if (self.preset is None) == (self.dit is None):
            raise ValueError("give exactly one of model.dit (weights) and model.preset (random weights)")
        if self.dit_high_noise is None and self.adapter_high_noise is not None:
            raise ValueError("model.adapter_high_noise needs model.dit_high_noise")
        if self.dit_high_noise is not None and (self.dit is None or self.noise_expert != "both"):
            raise ValueError(
                'model.dit_high_noise needs the low-noise model under model.dit, and noise_expert = "both"'
            )
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
    """Section `objective`: where t is drawn and what the losses weigh.

    The loss is the weighted sum of its terms. A term of weight 0 is not computed; a weight that is left out
    is that of the stage (`wanmoe.train.stages`).
    """

    t_sampling: Literal["uniform", "logit_normal", "sigmoid", "shift", "mode"] = "uniform"
    """sigmoid: logit_normal of mean 0; shift: sigmoid, moved by t_shift; mode: Stable Diffusion 3's, of
    weight t_mode."""
    t_shift: float = Field(1.0, gt=0)
    """t = s u / (1 + (s - 1) u): above 1 draws more noise. For every distribution but sigmoid."""
    t_mean: float = 0.0
    """Of the normal under logit_normal."""
    t_std: float = Field(1.0, gt=0)
    """Of the normal under logit_normal, sigmoid and shift."""
    t_mode: float = Field(1.29, ge=-1, le=1.75)
    """Under mode: above 0 draws the middle more often, below 0 the ends."""
    t_stratified: bool = True
    """The clips of a global batch draw t from equal shares of the distribution, one each."""
    t_range: tuple[float, float] | None = None
    """Slice of the distribution that is drawn from; default [0, 1], with `train.freeze_base` [0.2, 1]."""
    high_share: float | None = Field(None, gt=0, lt=1)
    """Where both models train (`model.dit_high_noise`): part of the steps that go to the high-noise one;
    default: what its side of the boundary has of the distribution of t."""
    diffusion: float | None = Field(None, ge=0)
    """Weight of the flow-matching error. Default 1."""
    roi: float | None = Field(None, ge=0)
    """Weight of the error in the instruments' region, which then counts 1 + roi, the rest 1. Default 3; c 1,
    pretrain 0."""
    identity: float | None = Field(None, ge=0)
    """Weight of the instrument that `classifier` sees in the predicted clip. Default 0; b 0.5 where a
    classifier is given."""
    temporal: float | None = Field(None, ge=0)
    """Weight of the change along the optical flow that the true clip does not have. Default 0; b 0.5."""
    entropy: float | None = Field(None, ge=0)
    """Weight of the distance of the learned gates' entropy from `entropy_target`. Default 0.01; c 0.05."""
    balance: float | None = Field(None, ge=0)
    """Weight of the uneven load of the experts under a learned router. Default 0.05; c 0.1."""
    teacher_kl: float | None = Field(None, ge=0)
    """Weight of KL(rule gates || router) while a router trains. Default 1."""
    orthogonality: float | None = Field(None, ge=0)
    """Weight of the overlap of the experts' down projections with the base's. Default 0."""
    entropy_target: float = Field(0.25, ge=0, lt=1)
    """Mean entropy of a clip's learned gates that is aimed at, in shares of log(experts)."""
    soft_start: float = Field(0.0, ge=0, lt=1)
    """With gates by label: share of every expert's gate that all have alike when training begins; it falls
    to 0 at `soft_until`."""
    soft_until: float = Field(0.5, gt=0, le=1)
    """Part of the steps after which the gates are as sharp as they stay."""
    classifier: Path | None = None
    """File of `wanmoe train-classifier`, for `identity` and for a router that reads the first frame."""
    temporal_on: Literal["latent", "pixels", "lpips"] = "latent"
    """Where `temporal` compares: on latents, or on decoded pictures by L1 or LPIPS."""
    vae: str | None = None
    """Codec that decodes where a term needs pictures: a file, or the stand-in haar."""
    lpips: Path | None = None
    """torchvision's AlexNet weights, for temporal_on = "lpips"."""

    @model_validator(mode="after")
    def _checked(self) -> ObjectiveConfig:
        if self.t_range is not None and not 0 <= self.t_range[0] < self.t_range[1] <= 1:
            raise ValueError(f"objective.t_range must rise within [0, 1], got {list(self.t_range)}")
        if self.t_sampling == "sigmoid" and self.t_shift != 1:
            raise ValueError('objective.t_sampling = "sigmoid" has no t_shift; "shift" has')
        if self.temporal_on == "lpips" and self.lpips is None:
            raise ValueError('objective.temporal_on = "lpips" needs its weights under objective.lpips')
        if self.temporal_on != "latent" and self.vae is None:
            raise ValueError(f'objective.temporal_on = "{self.temporal_on}" needs a codec: objective.vae')
        return self


class OptimizerConfig(Section):
    """Section `optimizer`: AdamW and its schedule."""

    lr: float | None = Field(None, gt=0)
    """Default by stage: pretrain 1e-3, a 1e-4, b 1e-4 (with freeze_base 5e-5), c 1e-3."""
    lr_high_noise: float | None = Field(None, gt=0)
    """Of the high-noise model where both train; default: as `lr`."""
    base_lr: float | None = Field(None, gt=0)
    """Of a base adapter that trains beside the experts in stage b; default: as `lr`."""
    router_lr: float | None = Field(None, gt=0)
    """Of a router that trains beside the experts in stage b; default 1e-4."""
    time_gate_lr: float = Field(1e-2, gt=0)
    """Of a learned time gate (`router.time_gate`), two numbers per expert, which no weight decay pulls."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    schedule: Literal["constant", "cosine"] | None = None
    """Default by stage: a constant, others cosine to zero."""
    warmup_steps: int | None = Field(None, ge=0)
    """Default by stage: a 100, b 50 (100 with a router), c 20, but a fifth of the steps at most."""
    max_grad_norm: float = Field(1.0, gt=0)


class TrainConfig(Section):
    """Section `train`: what is trained, for how long, and where results go."""

    stage: Stage
    """pretrain: all parameters of a small model; a: base adapter; b: base adapter and experts; c: router."""
    run: Path
    """Run folder: config, adapter, resume state, metrics."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; default: what `epochs` makes."""
    epochs: float | None = Field(None, gt=0)
    """Rounds over the clips, where steps are not given; default by stage: pretrain 20, a 10, b 25 (with a
    router 30; 15 and 20 with freeze_base), c 5."""
    accumulation: int = Field(1, ge=1)
    """Forwards per optimizer step and rank."""
    global_batch: int | None = Field(None, ge=1)
    """Clips per optimizer step over all ranks, in place of `accumulation`: the same run on another number of
    ranks."""
    sequence_parallel: int = Field(1, ge=1)
    """Consecutive ranks that share each clip, its tokens split among them: for clips too long for one card. A
    divisor of the model's attention heads (A14B: 2, 4, 5 or 8) and of the ranks."""
    seed: int = Field(0, ge=0)
    train_router: bool = False
    """In stage b, train a learned router together with the experts, taught by the labels."""
    freeze_base: bool = False
    """In stage b, train the experts alone and leave the base adapter as it is."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on accelerators, fp32 on the CPU. Masters, moments and gates are fp32 in both."""
    checkpointing: bool = False
    """Recompute the blocks that carry a graph in the backward."""
    log_every: int = Field(10, ge=1)
    val_every: int = Field(0, ge=0)
    """Steps between validations; 0: only at the start and at the end."""
    early_stop: str | None = None
    """Metric that validation logs and that should fall, such as `val/loss` or `val/roi`: the adapter file
    keeps its best, and training ends after `patience` validations without a better one."""
    patience: int = Field(5, ge=1)
    sample_every: int = Field(0, ge=0)
    """Steps between videos of held-out captions, one for each instrument, made by all ranks together; 0:
    none. Needs a codec under `objective.vae`."""
    sample_steps: int = Field(20, ge=1)
    """Denoising steps of such a video."""
    save_every: int = Field(100, ge=0)
    """Steps between resume states, from which a run that was killed goes on; 0: only when stopped and at the
    end."""
    keep: int = Field(2, ge=1)
    """Resume states kept."""
    save_failure: Literal["stop", "go_on"] = "stop"
    """What a save that fails on the way (a full disk) means; the last one of a run always ends it."""
    resume: bool = True
    """Continue from the run folder's newest valid resume state, if there is one."""
    max_bad_steps: int = Field(5, ge=1)
    """Stop after this many steps in a row with a non-finite loss; each is skipped on all ranks."""
    timeout: float = Field(1800, gt=0)
    """Seconds without a step, a validation or a save, after which a rank writes its stacks and ends the job
    with exit code 75."""

    @model_validator(mode="after")
    def _checked(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give train.steps or train.epochs, not both")
        if self.global_batch is not None and self.accumulation != 1:
            raise ValueError("give train.global_batch or train.accumulation, not both")
        if self.early_stop is not None and not self.val_every:
            raise ValueError("train.early_stop needs validations: set train.val_every")
        if self.stage != "b" and (self.train_router or self.freeze_base):
            raise ValueError("train.train_router and train.freeze_base are for stage b")
        return self


class DeepSpeedConfig(Section):
    """Section `deepspeed`: how the models are held, and any key of DeepSpeed's own config."""

    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage. 3 shards the base over the ranks; 0 to 2 keep a whole copy on each. auto: whole copies (1,
    on one rank 0) where they fit with what a step takes, else 3, else blocks stream (`ring`)."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Merged over the settings that are derived from the model."""


class RingConfig(Section):
    """Section `ring`: blocks of the frozen base that wait in host memory and stream to the card for their
    turn."""

    blocks: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """How many blocks of each model stream; the others stay on the card. auto: none where deepspeed.zero is
    set or the model fits in another way, else as many as must."""
    slots: int = Field(2, ge=2)
    """Places on the card for blocks that stream: one is computed with while the others fill."""

    @model_validator(mode="after")
    def _checked(self) -> RingConfig:
        if self.blocks != "auto" and 2 < self.slots > self.blocks:
            raise ValueError(f"ring.slots = {self.slots} is more than the {self.blocks} blocks that stream")
        return self


class TrackingConfig(Section):
    """Section `tracking`: MLflow."""

    enabled: bool = True
    uri: str | None = None
    """MLflow tracking URI; default: sqlite file `mlflow.db` beside the run folders."""
    experiment: str = "wanmoe"
    name: str | None = None
    """Name of the MLflow run; default: name of the run folder."""
    registered_model: str | None = Field(None, pattern=r"""^[^/:'"]+$""")
    """Registered model that every finished adapter becomes a version of; default: none is registered."""
    system_metrics_every: float = Field(30.0, ge=0)
    """Seconds between two figures of CPU, memory, disk, network and GPUs of rank 0's host; 0: none."""
    close_wait: float = Field(20.0, ge=0)
    """Seconds that the end of a run waits at most until MLflow has what is left; more is kept for later."""


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
    ring: RingConfig = RingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _frozen_base(self) -> TrainerConfig:
        held = bool(self.model.quantised) or self.ring.blocks not in ("auto", 0)
        if held and self.train.stage == "pretrain":
            raise ValueError("model.quantised and ring.blocks are for a frozen base, not for stage pretrain")
        if held and self.deepspeed.zero == 3:
            raise ValueError(
                "deepspeed.zero = 3 shards the base over the ranks: it goes with neither model.quantised nor "
                "ring.blocks; leave deepspeed.zero out"
            )
        return self

    @model_validator(mode="after")
    def _samples(self) -> TrainerConfig:
        if self.train.sample_every and self.objective.vae is None:
            raise ValueError("train.sample_every needs a codec that decodes: set objective.vae")
        if self.train.sample_every and self.model.noise_expert != "both":
            raise ValueError(
                "train.sample_every: a video takes both models, and this job trains the "
                f"{self.model.noise_expert}-noise one alone; give model.dit_high_noise beside model.dit"
            )
        return self
