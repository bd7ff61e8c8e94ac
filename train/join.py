"""Shards and store joined by (shard, key): what the loader's workers read, and how a batch is put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from compodistill.errors import MismatchError
from compodistill.shards import index_shard, read_sample, shard_digest
from compodistill.store.decode import decode_attention, decode_logits
from compodistill.store.reader import EncodedSample, Store
from compodistill.tokens import Tokens, collate, tokenize
from compodistill.train.step import Targets


@dataclass(frozen=True)
class Joined:
    """A tokenized sample and its signals as they are stored."""

    tokens: Tokens
    signals: EncodedSample


class JoinedDataset(Dataset[Joined]):
    """All samples of some shards, in shard order, with their signals; random access by index.

    Raises:
        MismatchError: a shard the store knows nothing of (it changed since, or was never run), or keys missing
            in the store; reading a sample raises it where tokens differ from what the teacher saw.
    """

    def __init__(
        self,
        store: Store,
        shards: Sequence[Path],
        processor: Any,
        image_token_id: int,
        max_length: int | None = None,
    ) -> None:
        self._store, self._processor = store, processor
        self._image_token_id, self._max_length = image_token_id, max_length
        known = {digest: name for digest, name, _ in store.fragments}
        self._entries: list[tuple[Path, str, Any]] = []
        for path in shards:
            digest = shard_digest(path)
            if digest not in known:
                raise MismatchError(
                    f"the store has no signals for this shard (sha256 {digest[:12]}...)",
                    where=str(path),
                    remedy="the shard changed since the teacher's pass, or was not part of it: "
                    "run cdist precompute with these shards",
                )
            self._entries += [(path, digest, entry) for entry in index_shard(path).entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, i: int) -> Joined:
        path, digest, entry = self._entries[i]
        sample = read_sample(path, entry)
        tokens = tokenize(self._processor, sample, self._image_token_id, self._max_length)
        signals = self._store.encoded(digest, sample.key)
        ours = tokens.digest()
        for field, stored in signals.digest.items():
            if ours[field] != stored:
                raise MismatchError(
                    f"{field} differ from what the teacher saw: {ours[field]} here, {stored} in the store",
                    where=f"{sample.where}, {field}",
                    remedy="train with the processor, tokenizer and chat template that are in the store",
                )
        return Joined(tokens, signals)


class Collator:
    """Joined samples -> model inputs and targets.

    Args:
        pad_token_id: of the tokenizer.
        signals: which of `logits` and `attention` the losses read; others stay undecoded.
    """

    def __init__(self, pad_token_id: int, signals: set[str]) -> None:
        self._pad_token_id, self._signals = pad_token_id, signals

    def __call__(self, batch: Sequence[Joined]) -> dict[str, Any]:
        tokens = [j.tokens for j in batch]
        supervised = [t.supervised_positions for t in tokens]
        out: dict[str, Any] = {
            "inputs": collate(tokens, self._pad_token_id),
            "positions": [p - 1 for p in supervised],
            "labels_A": torch.cat([t.labels[p] for t, p in zip(tokens, supervised, strict=True)]),
        }
        if "logits" in self._signals:
            logits = [decode_logits(j.signals) for j in batch]
            out["ids_AK"] = torch.cat([torch.from_numpy(x.ids).long() for x in logits])
            out["logprobs_AK"] = torch.cat([torch.from_numpy(x.logprobs) for x in logits])
        if "attention" in self._signals:
            out["encoded"] = [j.signals for j in batch]
            out["rows"] = [torch.from_numpy(j.signals.query_positions).long() for j in batch]
            out["columns"] = [t.visual_positions for t in tokens]
        return out


def to_targets(batch: dict[str, Any], device: torch.device) -> Targets:
    """The targets of a collated batch on the device; stored codes become floats here, not before."""
    fields = {k: v for k, v in batch.items() if k not in ("inputs", "encoded")}
    if "encoded" in batch:
        fields["attention"] = [decode_attention(e, device) for e in batch["encoded"]]
    return Targets(**fields)
