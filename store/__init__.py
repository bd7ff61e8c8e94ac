"""The signal store: the only code that knows Zarr, codecs and manifests.

writer = create_store(path, spec)             with writer.fragment(name, digest) as f: f.add(signals)
writer.seal(digests)                          store = open_store(path); store[key] -> SampleSignals
"""

from compodistill.store.reader import Store, open_store
from compodistill.store.signals import Logits, SampledLogits, SampleSignals
from compodistill.store.spec import StoreSpec, TeacherInfo
from compodistill.store.writer import create_store

__all__ = [
    "Logits",
    "SampleSignals",
    "SampledLogits",
    "Store",
    "StoreSpec",
    "TeacherInfo",
    "create_store",
    "open_store",
]
