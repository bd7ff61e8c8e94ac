"""The teacher's pass over shards: read, tokenize, forward, write, seal."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compodistill.errors import DataError, UsageError
from compodistill.groups import layer_groups, understanding_layers
from compodistill.models import VISION_FILE, VisionLanguageModel, load_model, vision_side
from compodistill.precompute.capture import CaptureSettings, capture
from compodistill.precompute.fingerprint import fingerprint
from compodistill.shards import iter_shard, shard_digest
from compodistill.store.signals import SampleSignals
from compodistill.store.spec import Codec, Rows, StoreSpec, TeacherInfo, versions
from compodistill.store.writer import create_store
from compodistill.tokens import BUCKET, Tokens, tokenize


@dataclass(frozen=True)
class PassOptions:
    """How the pass is run.

    Attributes:
        student_layers: decoder layers of the student the attention is grouped for; None keeps one slice per
            understanding layer, which serves students of any depth.
        rows, top_k, codec: what is kept and how it is stored.
        batch_size: samples a forward pass on a GPU, all of one padded length, the last batch filled up. On the CPU
            every sample is a pass of its own: batches gain nothing there, and the vision tower's few rows go through
            other kernels (and end in other last bits) alone than in company.
    """

    student_layers: int | None = None
    rows: Rows = "all"
    top_k: int = 64
    codec: Codec = "compact"
    batch_size: int = 8
    max_length: int | None = None
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def samples_at_once(self) -> int:
        return 1 if self.device_type == "cpu" else self.batch_size


def precompute(
    shards: Sequence[Path],
    teacher_path: Path,
    store_url: str,
    options: PassOptions,
    on_sample: Callable[[Path, int], None] = lambda shard, tokens: None,
    on_finished: Callable[[Path], None] = lambda shard: None,
) -> None:
    """Run the teacher over all shards and seal the store; what is finished already is not done again.

    Args:
        on_sample: called after each sample with its shard and number of tokens.
        on_finished: called for each shard that needed no work.

    Raises:
        UsageError, DataError, MismatchError, StoreError: see `load_model`, `iter_shard`, `create_store`.
    """
    digests = [shard_digest(shard) for shard in shards]
    if len(set(digests)) < len(digests):
        twin = next(s for s, d in zip(shards, digests, strict=True) if digests.count(d) > 1)
        raise UsageError("two shards have the same content", where=str(twin), remedy="pass each shard once")
    teacher = load_model(teacher_path, dtype=getattr(torch, options.dtype), device=options.device)
    settings = capture_settings(teacher, options)
    writer = create_store(store_url, store_spec(teacher, options, settings))
    with tempfile.TemporaryDirectory() as files:
        save_student_side(teacher, Path(files))
        writer.add_teacher_files(Path(files))
    for shard, digest in zip(shards, digests, strict=True):
        if writer.finished(digest):
            on_finished(shard)
            continue
        with writer.fragment(shard.name, digest) as fragment:
            n = 0
            for signals, length in signals_of_shard(teacher, shard, settings, options):
                fragment.add(signals)
                on_sample(shard, length)
                n += 1
            if n == 0:
                raise DataError("the shard has no samples", where=str(shard), remedy="leave it out")
    writer.seal(digests)


def capture_settings(teacher: VisionLanguageModel, options: PassOptions) -> CaptureSettings:
    """Which layers are kept, and how they are grouped for the student's depth."""
    layers = understanding_layers(teacher.n_layers)
    if options.student_layers is None:
        groups = [(i, i) for i in layers]
    else:
        groups = layer_groups(layers, len(understanding_layers(options.student_layers)))
    return CaptureSettings(groups, options.rows, options.top_k)


def store_spec(teacher: VisionLanguageModel, options: PassOptions, settings: CaptureSettings) -> StoreSpec:
    """What the store promises about its content."""
    kept = {"groups": settings.groups, "rows": settings.rows, "top_k": settings.top_k}
    config = teacher.model.config
    return StoreSpec(
        rows=options.rows,
        groups=settings.groups,
        per_layer=options.student_layers is None,
        top_k=min(options.top_k, teacher.vocab_size),
        codec=options.codec,
        vocab_size=teacher.vocab_size,
        fingerprint=fingerprint(
            teacher.path,
            dtype=options.dtype,
            device=options.device_type,
            batch_size=options.samples_at_once,
            capture=kept,
            max_length=options.max_length,
        ),
        teacher=TeacherInfo(
            name=teacher.path.resolve().name,
            model_type=config.model_type,
            layers=teacher.n_layers,
        ),
        versions=versions(),
    )


def save_student_side(teacher: VisionLanguageModel, out: Path) -> None:
    """Write what a student needs of the teacher: configuration, processor, vision tower and adapter weights."""
    teacher.model.config.save_pretrained(out)
    if teacher.model.can_generate():
        teacher.model.generation_config.save_pretrained(out)
    teacher.processor.save_pretrained(out)
    weights = {name: tensor.contiguous().cpu() for name, tensor in vision_side(teacher.model).items()}
    save_file(weights, out / VISION_FILE)


def signals_of_shard(
    teacher: VisionLanguageModel, shard: Path, settings: CaptureSettings, options: PassOptions
) -> Iterator[tuple[SampleSignals, int]]:
    """The signals of a shard's samples, in the shard's order, each with its number of tokens.

    Batches are made of samples with one padded length, within a window of a few batches, and always of the same
    number, so a sample's signals depend on nothing but itself.
    """
    n = options.samples_at_once
    samples = iter_shard(shard)
    tokens = (tokenize(teacher.processor, s, teacher.image_token_id, options.max_length) for s in samples)
    for window in _batched(tokens, 4 * n):
        done: dict[int, SampleSignals] = {}
        for indices in same_length(window, n):
            filled = [window[i] for i in indices] + [window[indices[-1]]] * (n - len(indices))
            done.update(zip(indices, capture(teacher, filled, settings), strict=False))  # fillers fall off the end
        for i, t in enumerate(window):
            yield done[i], len(t.input_ids)


def same_length(window: Sequence[Tokens], batch_size: int) -> Iterable[tuple[int, ...]]:
    """Indices of the window in batches of one padded length."""
    by_length: dict[int, list[int]] = {}
    for i, t in enumerate(window):
        by_length.setdefault(-(-len(t.input_ids) // BUCKET), []).append(i)
    for indices in by_length.values():
        yield from _batched(indices, batch_size)


def _batched(items: Iterable[Any], n: int) -> Iterator[tuple[Any, ...]]:
    """itertools.batched, which Python 3.11 does not have yet."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, n)):
        yield batch
