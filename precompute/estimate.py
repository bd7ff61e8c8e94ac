"""What a pass would take, measured on a few samples of the data before money is spent."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from compodistill.errors import DataError
from compodistill.models import VisionLanguageModel
from compodistill.precompute.capture import capture
from compodistill.precompute.options import PassOptions
from compodistill.precompute.plan import usable_entries
from compodistill.precompute.teacher import capture_settings, forget, teacher_in_use
from compodistill.shards import read_sample
from compodistill.store.signals import SampleSignals
from compodistill.store.spec import Codec, Rows, StoreSpec
from compodistill.store.writer import create_store
from compodistill.tokens import ROWS, Tokens, query_positions, tokenize


@dataclass
class Estimate:
    """A plan in figures.

    Attributes:
        n_samples: by the tars' headers.
        n_measured: samples the teacher was run on; the means below are theirs.
        seconds: a sample, from reading to the verified fragment, one worker.
        bytes_per_sample: (rows, codec) -> bytes a sample adds to a fragment.
        bytes_per_shard: (rows, codec) -> bytes of a fragment beside those (metadata).
        free_bytes: where the store would be; None if that is not a local disk.
    """

    n_shards: int
    n_samples: int
    options: PassOptions
    n_measured: int = 0
    n_unusable: int = 0
    seconds: float = 0.0
    tokens: float = 0.0
    supervised_tokens: float = 0.0
    visual_tokens: float = 0.0
    bytes_per_sample: dict[tuple[Rows, Codec], float] = field(default_factory=dict)
    bytes_per_shard: dict[tuple[Rows, Codec], float] = field(default_factory=dict)
    free_bytes: int | None = None

    def facts(self, workers: int) -> dict[str, Any]:
        """For `--json` and for the table."""
        out: dict[str, Any] = {
            "shards": self.n_shards,
            "samples": self.n_samples,
            "measured_on": self.n_measured,
            "unusable_among_them": self.n_unusable,
            "free_bytes": self.free_bytes,
        }
        if not self.n_measured:
            return out
        chosen = self.options.rows, self.options.codec
        usable = self.n_samples * self.n_measured / (self.n_measured + self.n_unusable)

        def of_all(mean: float) -> int:
            return round(mean * usable)

        return out | {
            "tokens": of_all(self.tokens),
            "supervised_tokens": of_all(self.supervised_tokens),
            "visual_tokens": of_all(self.visual_tokens),
            "bytes_per_sample": round(self.bytes_per_sample[chosen]),
            "bytes": self._bytes(chosen, usable),
            "workers": workers,
            "seconds_per_sample": self.seconds,
            "seconds": self.seconds * usable / workers,
            "choices": [
                {
                    "rows": rows,
                    "codec": codec,
                    "bytes_per_sample": round(size),
                    "bytes": self._bytes((rows, codec), usable),
                    "chosen": (rows, codec) == chosen,
                }
                for (rows, codec), size in self.bytes_per_sample.items()
            ],
        }

    def _bytes(self, choice: tuple[Rows, Codec], n: float) -> int:
        return round(n * self.bytes_per_sample[choice] + self.n_shards * self.bytes_per_shard[choice])


def estimate_pass(
    shards: Sequence[Path],
    teacher_path: Path,
    store_url: str,
    options: PassOptions,
    n: int,
    on_shard: Callable[[], None] = lambda: None,
) -> Estimate:
    """Count all samples and run the teacher on `n` of them, spread evenly over the shards; the store is not touched.

    The bytes of every choice of rows and codec are those of real fragments, written to a temporary directory.

    Raises:
        UsageError, DataError: see `load_model`, `usable_entries`, and `tokenize` where `options.on_error` is `stop`.
    """
    entries = []
    for shard in shards:
        entries += [(shard, entry) for entry in usable_entries(shard, options.on_error)[0]]
        on_shard()
    out = Estimate(len(shards), len(entries), options, free_bytes=free_space(store_url))
    if n == 0:
        return out
    places = sorted({round(i) for i in np.linspace(0, len(entries) - 1, min(n, len(entries)))})
    try:
        with teacher_in_use(teacher_path, options) as (teacher, spec), tempfile.TemporaryDirectory() as directory:
            _measure(out, [entries[i] for i in places], teacher, spec, Path(directory))
    finally:
        forget()
    return out


def _measure(
    out: Estimate, entries: list[tuple[Path, Any]], teacher: VisionLanguageModel, spec: StoreSpec, directory: Path
) -> None:
    options = out.options
    settings = capture_settings(teacher, options)
    tokens, reading = [], time.perf_counter()
    for shard, entry in entries:
        try:
            tokens.append(
                tokenize(teacher.processor, read_sample(shard, entry), teacher.image_token_id, options.max_length)
            )
        except DataError:
            if options.on_error == "stop":
                raise
            out.n_unusable += 1
    reading = (time.perf_counter() - reading) / len(entries)
    if not tokens:
        return
    out.n_measured = len(tokens)
    out.tokens = _mean([len(t.input_ids) for t in tokens])
    out.supervised_tokens = _mean([len(t.supervised_positions) for t in tokens])
    out.visual_tokens = _mean([len(t.visual_positions) for t in tokens])

    capture(teacher, _filled(tokens[:1], options), settings)  # the first pass of a process is slower than all others
    forward, chosen, everything = 0.0, [], []
    for i in range(0, len(tokens), options.samples_at_once):
        batch = tokens[i : i + options.samples_at_once]
        started = time.perf_counter()
        signals = capture(teacher, _filled(batch, options), settings)
        forward += time.perf_counter() - started
        chosen += signals[: len(batch)]
        if options.rows == "all":
            everything += signals[: len(batch)]
        else:
            everything += capture(teacher, _filled(batch, options), replace(settings, rows="all"))[: len(batch)]
    for rows in ROWS:
        kept = [narrowed(s, t, rows) for s, t in zip(everything, tokens, strict=True)]
        for codec in get_args(Codec):
            choice = spec.model_copy(update={"rows": rows, "codec": codec})
            started = time.perf_counter()
            size = _stored(kept, choice, directory / "all")
            if (rows, codec) == (options.rows, options.codec):
                out.seconds = reading + (forward + time.perf_counter() - started) / len(tokens)
            once, twice = (_stored(kept[:1] * times, choice, directory / "first") for times in (1, 2))
            out.bytes_per_shard[rows, codec] = max(0, 2 * once - twice)
            out.bytes_per_sample[rows, codec] = (size - out.bytes_per_shard[rows, codec]) / len(kept)


def _filled(batch: list[Tokens], options: PassOptions) -> list[Tokens]:
    return batch + [batch[-1]] * (options.samples_at_once - len(batch))


def narrowed(signals: SampleSignals, tokens: Tokens, rows: Rows) -> SampleSignals:
    """Signals with all rows, cut down to some."""
    wanted = query_positions(tokens, rows).numpy().astype(np.int32)
    places = np.searchsorted(signals.query_positions, wanted)
    return replace(signals, query_positions=wanted, attention=np.ascontiguousarray(signals.attention[:, places]))


def _stored(samples: list[SampleSignals], spec: StoreSpec, place: Path) -> int:
    """Bytes of a fragment with these samples; two of one key (from two shards) are told apart."""
    writer = create_store(place, spec)
    with writer.fragment("estimate", "0" * 64) as fragment:
        for i, signals in enumerate(samples):
            fragment.add(replace(signals, key=f"{i:06d}-{signals.key}"))
    shutil.rmtree(place)
    return fragment.n_bytes


def _mean(counts: list[int]) -> float:
    return sum(counts) / len(counts)


def free_space(store_url: str) -> int | None:
    """Free bytes of the disk the store would be on."""
    if "://" in store_url and not store_url.startswith("file://"):
        return None
    place = Path(store_url.removeprefix("file://")).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
