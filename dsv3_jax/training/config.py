"""The configuration of a training run, in one dataclass that is stored with its results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from dsv3_jax.checkpoint.runs import read_config
from dsv3_jax.config import PRESETS, ConfigError, ModelConfig, build_dataclass
from dsv3_jax.data import DataConfig
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.parallel.processes import Processes
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.guard import GuardConfig
from dsv3_jax.training.optimizer import OptimizerConfig
from dsv3_jax.training.schedule import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. On a CPU, runs with equal configs are bit-identical."""

    model: ModelConfig
    runtime: Runtime
    data: DataConfig
    schedule: ScheduleConfig
    optimizer: OptimizerConfig
    objective: Literal["pretraining", "sft"] = "pretraining"
    """`sft`: cross entropy of the targets alone, without balancing; MTP modules are trained with
    schedule.final_mtp_weight, without affecting the model.
    """
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    """Devices along each mesh axis, which are used as in `runtime.sharding`; by default one device."""
    microbatches: int = 1
    """Number of microbatches whose gradients are accumulated."""
    seed: int = 0
    """Seed of the parameters' initialisation; the data has its own seed."""
    init_from: str | None = None
    """Start from the weights of a run, a converted checkpoint or a Hugging Face directory, instead of random weights.
    The architecture is then that model's, except that length and RoPE may be changed.
    """
    init_optimizer: bool = False
    """With init_from: also load the moments of that run's optimizer; by default they start at zero."""
    log_every: int = 10
    """Steps between lines of metrics."""
    validate_every: int = 200
    """Steps between validations, and after the last step."""
    validation_batches: int = 8
    """Batches per validation."""
    checkpoint_every: int = 200
    """Steps between checkpoints, and after the last step."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep, besides the newest one that was saved while the run was well."""
    keep_every: int = 0
    """Keep checkpoints whose step this divides permanently; 0 for none."""
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    """When the run skips a step, rolls back, or stops by itself."""
    trace_steps: str | None = None
    """Steps to trace with xprof into `traces/`, as FIRST:LAST, such as 10:12; the first step is 1."""
    wandb_project: str | None = None
    """Weights & Biases project to send the metrics to; it must be installed."""
    sample_prompt: str = "def "
    """Prompt of the sample at the end."""
    sample_tokens: int = 400
    """Length of the sample in tokens; 0 for none."""

    def __post_init__(self) -> None:
        for name in (
            "microbatches",
            "log_every",
            "validate_every",
            "validation_batches",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("keep_every", "sample_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.objective not in ("pretraining", "sft"):
            raise ConfigError(f"objective is {self.objective!r}: it must be 'pretraining' or 'sft'")
        traced_steps(self.trace_steps)
        if self.init_optimizer and self.init_from is None:
            raise ConfigError("init_optimizer is True, but init_from names no run to take an optimizer's state from")
        if self.runtime.redundant_experts:
            raise ConfigError(
                f"runtime.redundant_experts is {self.runtime.redundant_experts}: copies of experts are for serving, "
                "training takes 0"
            )
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"data.sequence_length is {self.data.sequence_length}: it must be at most "
                f"model.max_position_embeddings ({self.model.max_position_embeddings})"
            )
        depth = self.model.num_nextn_predict_layers
        if self.data.sequence_length <= depth:
            raise ConfigError(
                f"data.sequence_length is {self.data.sequence_length}: it must be above model.num_nextn_predict_layers "
                f"({depth}), or the last MTP module has nothing to predict"
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}: it must be in [0, 2**32)")
        if self.schedule.batch_size % self.microbatches:  # a ramp's other sizes are filled up
            raise ConfigError(
                f"microbatches is {self.microbatches}, which doesn't divide schedule.batch_size "
                f"({self.schedule.batch_size})"
            )

    @classmethod
    def preset(cls, name: str, backend: str | None = None, *, steps: int | None = None) -> TrainConfig:
        """Returns a run of the model preset `name`: the report's recipe, scaled down for small models.

        Args:
          backend: "cpu", "gpu" or "tpu", by default JAX's.
          steps: overrides the preset's, with a warm-up of at most a tenth of them.
        """
        config = cls._preset(name, jax.default_backend() if backend is None else backend)
        if steps is None:
            return config
        warmup = min(config.schedule.warmup_steps, max(steps // 10, 1))
        schedule = dataclasses.replace(config.schedule, steps=steps, warmup_steps=warmup)
        return dataclasses.replace(config, schedule=schedule)

    @classmethod
    def _preset(cls, name: str, backend: str) -> TrainConfig:
        if name not in PRESETS:
            ModelConfig.preset(name)  # raises, naming the presets
        model, runtime = ModelConfig.preset(name), Runtime.for_backend(backend)
        if (
            name == "tiny"
        ):  # minutes on two CPU cores: short warm-up, and rates and biases that move as far in fewer steps
            schedule = ScheduleConfig(
                steps=480,
                batch_size=16,
                peak_learning_rate=3e-3,
                end_learning_rate=3e-4,
                tail_learning_rate=1e-4,
                warmup_steps=50,
                constant_until=0.4,
                bias_update_speed=0.01,
            )
            return cls(
                model,
                runtime,
                DataConfig(sequence_length=256),
                schedule,
                OptimizerConfig(),
                validate_every=120,
                checkpoint_every=120,
            )
        if name == "v3-mini":
            schedule = ScheduleConfig(
                steps=20000,
                batch_size=64,
                peak_learning_rate=1e-3,
                end_learning_rate=1e-4,
                tail_learning_rate=3e-5,
                warmup_steps=500,
            )
            return cls(
                model, runtime, DataConfig(sequence_length=1024), schedule, OptimizerConfig(), checkpoint_every=1000
            )
        # The report's pre-training is at 4K, before YaRN extends the context (sections 4.2 and 4.3).
        model = dataclasses.replace(model, rope_scaling=None, max_position_embeddings=4096)
        schedule = ScheduleConfig(steps=242_800, initial_batch_size=3072)
        optimizer = OptimizerConfig(moments_dtype="bfloat16")
        return cls(model, runtime, DataConfig(sequence_length=4096), schedule, optimizer, checkpoint_every=1000)

    def fine_tuning(self) -> TrainConfig:
        """Returns supervised fine-tuning of the same model as in the report (section 5.1).

        A cosine decay from 5e-6 to 1e-6, on samples that don't attend to each other.
        """
        rates = dict(peak_learning_rate=5e-6, end_learning_rate=1e-6, tail_learning_rate=1e-6)
        schedule = ScheduleConfig(steps=200, batch_size=16, warmup_steps=10, constant_until=0.0, **rates)  # type: ignore[arg-type]
        data = dataclasses.replace(self.data, packing="best_fit", mask_documents=True)
        how: dict[str, Any] = dict(objective="sft", validate_every=100, checkpoint_every=100, sample_tokens=0)
        return dataclasses.replace(self, schedule=schedule, data=data, **how)

    @classmethod
    def from_json(cls, path: Path) -> TrainConfig:
        """Reads the `config.json` of a run. Raises ConfigError if it isn't one."""
        try:
            values = read_config(path)
            values.pop("tokenizer_files", None)  # of the directory, not of the run: `training.directory`
            config: TrainConfig = build_dataclass(cls, values, str(path))
            return config
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror or error}") from None
        except ConfigError as error:
            raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    def flat(self) -> dict[str, Any]:
        """Returns all fields by their names as options, such as `schedule.steps`."""
        return _flatten(dataclasses.asdict(self))

    def differences(self, other: TrainConfig) -> list[str]:
        """Lists the fields in which two configs describe different runs, as lines `name: mine, there other's`.

        Fields in `changes` that don't affect the result are ignored, since a resumed run may change them.
        """
        return [line for name, line in self.changes(other).items() if not _is_free(name)]

    def changes(self, other: TrainConfig) -> dict[str, str]:
        """Lists all fields in which two configs differ, formatted as in `differences`."""
        mine, others = self.flat(), other.flat()
        return {
            k: f"{k}: {mine.get(k)!r}, there {others.get(k)!r}"
            for k in sorted(mine | others)
            if mine.get(k) != others.get(k)
        }


def traced_steps(value: str | None) -> range:
    """Parses `trace_steps`, counted from 1. Raises ConfigError."""
    if value is None:
        return range(0)
    first, _, last = value.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"trace_steps is {value!r}: it must be FIRST:LAST, as 10:12, of steps counted from 1")
    return range(int(first), int(last) + 1)


_FREE = (
    *("microbatches", "log_every", "validate_every", "validation_batches", "checkpoint_every"),
    *("keep_checkpoints", "keep_every"),
    *("sample_prompt", "sample_tokens", "trace_steps", "wandb_project"),
    *("data.source", "data.sources", "data.tokenizer"),  # where they lie: hashes tell whether they are the same
    "data.workers",
    *("model.bos_token_id", "model.eos_token_id"),  # a run takes them from its tokenizer
)
"""Fields that a resumed run may change, besides the mesh and the runtime except dtypes."""


_DTYPES = ("runtime.dtype", "runtime.param_dtype", "runtime.gradient_dtype")


def _is_free(name: str) -> bool:
    computed = name.startswith(("mesh.", "runtime.")) and name not in _DTYPES
    return computed or name in _FREE or name.startswith("guard.")


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Train a model, and write everything about the run to a directory.

    Every field of the run can be set: `--schedule.steps 100 --model.hidden-size 256 --data.source my/texts`. Defaults
    are the preset's or, with `--resume`, the run's own. Ctrl-C saves and stops; `--resume` continues, bit-identically
    on a CPU.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: str = "tiny"
    """Preset of model and recipe: tiny, v3-mini, v2-lite-16b, v2-236b, v3-671b, moonlight-16b, glm-4.7-flash or
    kimi-k2-1t."""
    run_dir: Path = Path("runs/tiny")
    """The run's directory, or a URL, such as gs://bucket/run; runs/PRESET by default."""
    resume: bool = False
    """Continue the run in run_dir from its newest checkpoint, with its own config, on the same or another mesh. Options
    that don't affect the result may be changed.
    """
    auto_resume: bool = False
    """Continue the run in run_dir as with --resume if it has begun, else start it: for jobs that are restarted with the
    same command.
    """
    check_hashes: bool = True
    """With --resume or --init-from: compare the files of the checkpoint with their hashes."""
    processes: Processes = dataclasses.field(default_factory=Processes)
    """How the processes of a job find each other."""


@dataclasses.dataclass(frozen=True)
class SFTArgs(TrainArgs):
    """Fine-tune a model on chats (report section 5.1).

    `--init-from` names the weights, and `--data.source` chats prepared with `prepare --chat`, whose targets are what
    the assistant wrote. Samples don't attend to each other; MTP modules are trained without affecting the model.
    Otherwise as `train`.
    """


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
