"""The teacher in a process: loaded once, checked against the store's fingerprint, shared by all shards."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

from compodistill.groups import layer_groups, understanding_layers
from compodistill.models import VISION_FILE, VisionLanguageModel, load_model, vision_side
from compodistill.precompute.capture import CaptureSettings
from compodistill.precompute.fingerprint import fingerprint
from compodistill.precompute.options import PassOptions
from compodistill.store.spec import StoreSpec, TeacherInfo, require_same, versions
from compodistill.store.writer import create_store


@dataclass(frozen=True)
class Job:
    """What every shard's task is told: small, sent to workers.

    Attributes:
        teacher, store: path and URL as the workers see them.
        spec: what the store promises; a worker whose teacher does not fit it refuses to work.
    """

    teacher: Path
    store: str
    options: PassOptions
    spec: StoreSpec


_lock = threading.RLock()  # one pass at a time in a process: the open tap is the process's
_loaded: tuple[tuple[Path, PassOptions], VisionLanguageModel, StoreSpec] | None = None


def prepare(teacher_path: Path, store_url: str, options: PassOptions) -> Job:
    """Load the teacher, open its store (made if there is none) and put the files a student needs into it.

    Raises:
        UsageError, MismatchError: see `load_model`, `create_store`.
    """
    forget()  # the directory may hold another model by now
    with teacher_in_use(teacher_path, options) as (teacher, spec):
        writer = create_store(store_url, spec)
        writer.clean()  # half-written fragments of killed passes would pile up until the seal
        with tempfile.TemporaryDirectory() as files:
            try:
                save_student_side(teacher, Path(files))
            except Exception as error:  # libraries in Rust raise their own kinds where a disk is full
                if isinstance(error, OSError) or "os error" not in str(error):
                    raise
                raise OSError(None, str(error), files) from error
            writer.add_teacher_files(Path(files))
    return Job(teacher_path, store_url, options, spec)


@contextlib.contextmanager
def teacher_of(job: Job) -> Iterator[VisionLanguageModel]:
    """The job's teacher, for one task at a time.

    Raises:
        MismatchError: the directory holds another teacher here than where the job was prepared.
    """
    with teacher_in_use(job.teacher, job.options) as (teacher, spec):
        require_same(spec, job.spec, f"{job.teacher}, as this worker sees it")
        yield teacher


@contextlib.contextmanager
def teacher_in_use(path: Path, options: PassOptions) -> Iterator[tuple[VisionLanguageModel, StoreSpec]]:
    """The teacher and its store's spec, loaded at the first call in this process."""
    global _loaded
    with _lock, _threads(options.threads):
        if _loaded is None or _loaded[0] != (path, options):
            _loaded = None  # make room first
            disable_progress_bar()  # of loading weights: the pass has its own
            teacher = load_model(path, dtype=getattr(torch, options.dtype), device=options.device)
            _loaded = (path, options), teacher, store_spec(teacher, options)
        yield _loaded[1:]


def forget() -> None:
    """Free the teacher."""
    global _loaded
    with _lock:
        _loaded = None


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def capture_settings(teacher: VisionLanguageModel, options: PassOptions) -> CaptureSettings:
    """Which layers are kept, and how they are grouped for the student's depth."""
    layers = understanding_layers(teacher.n_layers)
    if options.student_layers is None:
        groups = [(i, i) for i in layers]
    else:
        groups = layer_groups(layers, len(understanding_layers(options.student_layers)))
    return CaptureSettings(groups, options.rows, options.top_k)


def store_spec(teacher: VisionLanguageModel, options: PassOptions) -> StoreSpec:
    """What the store promises about its content."""
    settings = capture_settings(teacher, options)
    kept = {"groups": settings.groups, "rows": settings.rows, "top_k": settings.top_k}
    on_cpu = options.device_type == "cpu"
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
            device=f"cpu, {options.threads} thread(s)" if on_cpu else options.device_type,
            batch_size=options.samples_at_once,
            capture=kept,
            max_length=options.max_length,
        ),
        teacher=TeacherInfo(
            name=teacher.path.resolve().name,
            model_type=teacher.model.config.model_type,
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
