"""Shards and store joined by (shard, key): what the loader's workers read, and how a batch is put together."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from compodistill.errors import CdistError, MismatchError
from compodistill.shards import ShardIndex, index_shard, read_sample
from compodistill.store.decode import decode_attention, decode_logits
from compodistill.store.reader import EncodedSample, Store
from compodistill.store.signals import Logits
from compodistill.tokens import Tokens, collate, tokenize
from compodistill.train.order import NOTHING, WINDOW
from compodistill.train.step import Targets
from compodistill.train.survey import Survey, survey

MAX_INDEXED = 4 * WINDOW  # samples whose places in their tars a worker remembers


@dataclass(frozen=True)
class Joined:
    """A tokenized sample and its signals as they are stored."""

    tokens: Tokens
    signals: EncodedSample


class JoinedDataset(Dataset[Joined]):
    """All samples of some shards with their signals; random access by index.

    Samples are numbered shard by shard, shards by digest. What it holds, and what a copy of it in a worker grows to,
    is bounded by the number of shards and `MAX_INDEXED`, not by the number of samples.

    Args:
        shards: paths, or what `survey` found of them.

    Raises:
        MismatchError: a shard the store knows nothing of (it changed since, or was never run), or keys missing
            in the store; reading a sample raises it where tokens differ from what the teacher saw.
    """

    def __init__(
        self,
        store: Store,
        shards: Sequence[Path] | Survey,
        processor: Any,
        image_token_id: int,
        max_length: int | None = None,
    ) -> None:
        self._store, self._processor = store, processor
        self._image_token_id, self._max_length = image_token_id, max_length
        found = shards if isinstance(shards, Survey) else survey(store, shards)
        self._shards = [s for s in found.shards if s.samples]
        self._ends = list(accumulate(s.samples for s in self._shards))
        self._indices: OrderedDict[int, tuple[ShardIndex, list[str]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indices": OrderedDict()}

    @property
    def sizes(self) -> list[int]:
        """Samples of each shard, in the order of their numbers."""
        return [s.samples for s in self._shards]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Joined:
        if not 0 <= i < len(self):
            raise IndexError(i)
        n = bisect_right(self._ends, i)
        shard = self._shards[n]
        index, keys = self._index(n)
        sample = read_sample(shard.path, index[keys[i - self._ends[n] + shard.samples]])
        tokens = tokenize(self._processor, sample, self._image_token_id, self._max_length)
        signals = self._store.encoded(shard.digest, sample.key)
        ours = tokens.digest()
        for field, stored in signals.digest.items():
            if ours[field] != stored:
                raise MismatchError(
                    f"{field} differ from what the teacher saw: {ours[field]} here, {stored} in the store",
                    where=f"{sample.where}, {field}",
                    remedy="train with the processor, tokenizer and chat template that are in the store",
                )
        return Joined(tokens, signals)

    def _index(self, n: int) -> tuple[ShardIndex, list[str]]:
        """Where the members of shard n stand, and its keys that have signals; those used last are remembered."""
        if n in self._indices:
            self._indices.move_to_end(n)
            return self._indices[n]
        shard = self._shards[n]
        missing = set(shard.missing)
        index = index_shard(shard.path)
        keys = [k for k in index.keys if k not in missing]
        if len(keys) != shard.samples:
            raise MismatchError(
                f"the shard changed while it was read: {len(keys)} samples now, {shard.samples} before",
                where=str(shard.path),
                remedy="start again, and leave the shards alone while they are trained on",
            )
        self._indices[n] = index, keys
        while len(self._indices) > 1 and sum(len(i) for i, _ in self._indices.values()) > MAX_INDEXED:
            self._indices.popitem(last=False)
        return index, keys


class Collator:
    """Joined samples -> model inputs and targets.

    Args:
        pad_token_id: of the tokenizer.
        signals: which of `logits` and `attention` the losses read; others stay undecoded.
    """

    def __init__(self, pad_token_id: int, signals: set[str]) -> None:
        self._pad_token_id, self._signals = pad_token_id, signals

    def __call__(self, batch: Sequence[Joined], *, counted: bool = True) -> dict[str, Any]:
        """The batch; without targets where it is not counted: a forward pass that teaches nothing."""
        tokens = [j.tokens for j in batch]
        supervised = [t.supervised_positions if counted else t.supervised_positions[:0] for t in tokens]
        out: dict[str, Any] = {
            "inputs": collate(tokens, self._pad_token_id),
            "positions": [p - 1 for p in supervised],
            "labels_A": torch.cat([t.labels[p] for t, p in zip(tokens, supervised, strict=True)]),
        }
        if "logits" in self._signals:
            logits = [_top_k(j.signals) for j in batch]
            out["ids_AK"] = torch.cat([torch.from_numpy(x.ids).long() for x in logits])
            out["logprobs_AK"] = torch.cat([torch.from_numpy(x.logprobs) for x in logits])
            if not counted:
                out["ids_AK"], out["logprobs_AK"] = out["ids_AK"][:0], out["logprobs_AK"][:0]
        if "attention" in self._signals:
            out["encoded"] = [j.signals for j in batch] if counted else []
            out["rows"] = [torch.from_numpy(j.signals.query_positions).long() for j in batch]
            out["columns"] = [t.visual_positions for t in tokens]
            if not counted:
                out["rows"] = out["columns"] = [p[:0] for p in out["columns"]]
        return out


class BatchReader(Dataset[Any]):
    """Whole micro batches by their samples' numbers, read and collated where the loader runs.

    An error is returned, not raised: on its way out of a worker process the loader would turn it into a traceback of
    text, and among several ranks all have to stop for it.
    """

    def __init__(self, dataset: JoinedDataset, collator: Collator) -> None:
        self.dataset, self.collator = dataset, collator

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, numbers: list[int]) -> dict[str, Any] | CdistError:
        counted = numbers != [NOTHING]
        try:
            return self.collator([self.dataset[i] for i in (numbers if counted else [0])], counted=counted)
        except CdistError as error:
            return error


def _top_k(signals: EncodedSample) -> Logits:
    """The teacher's top-k of a sample.

    Raises:
        MismatchError: the store keeps draws from the teacher's distribution, which no loss reads yet.
    """
    logits = decode_logits(signals)
    if not isinstance(logits, Logits):
        raise MismatchError(
            "the store keeps ids drawn from the teacher's distribution, the KL term needs the most likely ones",
            where=signals.where,
            remedy="use a store written with top-k logits",
        )
    return logits


def to_targets(batch: dict[str, Any], device: torch.device) -> Targets:
    """The targets of a collated batch on the device; stored codes become floats here, not before."""
    fields = {k: v for k, v in batch.items() if k not in ("inputs", "encoded", "counts")}
    if "encoded" in batch:
        fields["attention"] = [decode_attention(e, device) for e in batch["encoded"]]
    return Targets(**fields)
