"""Recipes: what each stage trains, with which losses and weights; YAML files checked field by field."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from compodistill.errors import UsageError

StageName = Literal["dpt", "dft", "sft"]
STAGES: tuple[StageName, ...] = ("dpt", "dft", "sft")  # the paper's order


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Losses(_Strict):
    """Weights of the loss terms; 0 leaves a term out.

    Attributes:
        lm: cross entropy of the supervised tokens.
        kl: KL(teacher || student) at the supervised tokens.
        attention: 1 - cosine of the visual-attention slices, mean over rows, groups and samples.
    """

    lm: float = Field(default=1.0, ge=0)
    kl: float = Field(default=0.0, ge=0)
    attention: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _something_reads_the_logits(self) -> Losses:
        if self.lm == 0 and self.kl == 0:
            raise ValueError("lm and kl cannot both be 0: nothing would teach the student to answer")
        return self


class Stage(_Strict):
    """One training stage.

    Attributes:
        train: the parts that learn, of `adapter` and `llm`.
        epochs, max_steps: how long; max_steps, where positive, wins.
        batch_size: samples of one optimizer step, over all ranks: the numbers of a run do not depend on how many.
        accumulate: pieces each rank's share of the batch is computed in, one after the other.
        tail: what the KL does with the mass outside the kept logits: one more class (`bucket`, a lower bound
            of the full KL) or none (`renormalise`, both sides scaled to the kept ids).
    """

    train: list[Literal["adapter", "llm"]] = Field(min_length=1)
    losses: Losses = Losses()
    tail: Literal["bucket", "renormalise"] = "bucket"
    temperature: float = Field(default=1.0, gt=0)
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int = -1
    batch_size: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    scheduler: str = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)


class Lora(_Strict):
    """Low-rank adaptation of the language model: in every stage that trains `llm`, merged at the stage's end.

    Attributes:
        targets: names of the decoder's layers (`q_proj`, ...); every linear layer where None.
    """

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] | None = Field(default=None, min_length=1)


class Recipe(_Strict):
    """A recipe: the student's shape, its stages, and how the run behaves.

    Attributes:
        lora: low-rank adaptation of the language model; full fine-tuning where None.
        shuffle_window: samples that are shuffled together (in whole shards): more is more random, less is more
            sequential reading.
        workers: loader processes of each rank.
        log_every, save_every: steps between log lines and between checkpoints; 0 saves none.
        bf16: automatic mixed precision; the weights stay float32.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
        report_to: trackers the log goes to, of `tensorboard`, `wandb`, `trackio`; where None, tensorboard if it is
            installed.
    """

    name: str
    adapter: Literal["fetched", "own"] = "fetched"
    lora: Lora | None = None
    stages: dict[StageName, Stage] = Field(min_length=1)
    seed: int = Field(default=0, ge=0)
    max_length: int | None = None
    shuffle_window: int = Field(default=16_384, ge=1)
    workers: int = Field(default=0, ge=0)
    log_every: int = Field(default=10, ge=1)
    save_every: int = Field(default=500, ge=0)
    bf16: bool = False
    activation_checkpointing: bool = False
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] | None = None

    def signals(self, stage: StageName) -> set[str]:
        """The signals the losses of a stage read from the store."""
        losses = self.stages[stage].losses
        return {name for name, weight in (("logits", losses.kl), ("attention", losses.attention)) if weight > 0}


def builtin() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in (files("compodistill.train") / "recipes").iterdir())


def load_recipe(name: str, config: Path | None = None, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by name or path, lay a config file and `a.b=c` overrides over it, and check every field.

    Raises:
        UsageError: no such recipe, unreadable YAML, an unknown key or a value out of range; names the key.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else files("compodistill.train") / "recipes" / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(f"no recipe {name!r}", remedy=f"one of {', '.join(builtin())}, or the path of a YAML file")
    merged = _yaml(Path(str(path)))
    try:
        if config is not None:
            merged = OmegaConf.merge(merged, _yaml(config))
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides or [])))
        plain: Any = OmegaConf.to_container(
            merged, resolve=False
        )  # no interpolation: a config reads nothing but itself
        return Recipe.model_validate(plain)
    except ValidationError as e:
        faults = [f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in e.errors()]
        raise UsageError("the recipe is not valid: " + "; ".join(faults), where=str(name)) from e
    except OmegaConfBaseException as e:
        raise UsageError(f"the overrides cannot be read: {e}", where=" ".join(overrides or [])) from e


def _yaml(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"no config file at {path}")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError) as e:
        raise UsageError(f"not readable as YAML: {e}", where=str(path)) from e
    if not OmegaConf.is_dict(loaded):
        raise UsageError("a recipe is a YAML mapping", where=str(path))
    return loaded
