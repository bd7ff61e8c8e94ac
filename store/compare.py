"""Whether two fragments of one shard say the same, whatever compressed them."""

from __future__ import annotations

import numpy as np

from compodistill.errors import StoreError
from compodistill.store.fragment_reader import Fragment
from compodistill.store.table import SIGNALS


def same_content(there: Fragment, here: Fragment) -> None:
    """Compare two fragments sample by sample, as zstd's bytes may change from version to version.

    Raises:
        StoreError: they differ; names the first sample and field.
    """

    def differ(what: str) -> StoreError:
        return StoreError(
            f"two results for one shard differ: {what}",
            where=f"shard {here.shard_name} ({here.shard_digest})",
            remedy="the teacher's pass is not reproducible here: find out why before you mix its results",
        )

    if there.table.keys != here.table.keys:
        raise differ("the keys")
    for i, key in enumerate(here.table.keys):
        if there.table.digest(i) != here.table.digest(i):
            raise differ(f"the token digest of key {key}")
        pairs = zip(there.table.positions(i), here.table.positions(i), strict=True)
        if not all(np.array_equal(a, b) for a, b in pairs):
            raise differ(f"the positions of key {key}")
        for signal in SIGNALS:
            if there.payload(i, signal) != here.payload(i, signal):
                raise differ(f"the {signal} of key {key}")
