"""A README for a store, with the metadata block model hubs read."""

from __future__ import annotations

from compodistill.store.reader import Store

FIGURES = {
    "attention_cosine_mean": "mean cosine of stored and exact attention rows",
    "attention_cosine_p01": "1st percentile of these cosines",
    "logits_kl_mean": "KL divergence of the exact from the stored logits (kept tokens and tail)",
    "tail_mass_mean": "probability beyond the kept tokens",
}


def card(store: Store, data: str = "") -> str:
    """The text of a store's README.

    Args:
        data: one line on the shards.
    """
    info, spec = store.info, store.info.spec
    teacher = spec.teacher
    if spec.draws:
        logits = f"{spec.draws} ids drawn from the teacher's distribution at every answer token, with counts"
    else:
        logits = f"the {spec.top_k} most likely tokens at every answer token, with the log-sum-exp"
    grouped = "one slice per understanding layer" if spec.per_layer else "slices averaged over windows of layers"
    layers = ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in spec.groups)
    fidelity = "\n".join(f"| {FIGURES.get(n, n)} | {v:.5g} |" for n, v in store.fidelity.items())
    return f"""---
tags: [cdist, distillation, vision-language]
license: {teacher.licence.lower() or "unknown"}
---

# Signals of {teacher.name}

What a vision-language teacher says of a set of image-text conversations, for distilling students without the teacher
in memory: [cdist](https://pypi.org/project/compodistill/) store, Zarr v3.

| | |
|---|---|
| teacher | {teacher.name} ({teacher.model_type or "type not given"}, {teacher.layers} layers) |
| revision | {teacher.revision or "not given"} |
| licence of the teacher | {teacher.licence or "not given"} |
| data | {data or "not given"} |
| samples | {info.n_samples:,} in {info.n_fragments:,} fragments, one per input shard |
| size | {info.n_bytes / 1e6:,.1f} MB, {info.n_bytes / max(1, info.n_samples) / 1e3:,.1f} kB a sample |
| logits | {logits} |
| attention | rows: {spec.rows}; {grouped}: {layers} |
| codec | {spec.codec} |
| content | sha256 {info.content_sha256 or "(not sealed)"} |

How close what is stored is to what the teacher said, measured while writing:

| figure | value |
|---|---|
{fidelity}

```sh
cdist store verify STORE
cdist train --store STORE --shards 'DIR/*.tar' --student LLM --out DIR
```

The shards are not part of the store; training needs those this store was made with, recognised by their content.
"""
