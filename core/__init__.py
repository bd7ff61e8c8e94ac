"""cdist: distil a vision-language teacher into a small student without the teacher in memory.

import compodistill as cd

store = cd.open_store("teacher.zarr")                   # read-only; refuses what its manifest does not vouch for
signals = store["000042"]                               # decoded signals of one sample, numpy
teacher = cd.load_model("path/to/teacher")              # a vision-language model and its processor
captured = cd.capture(teacher, [cd.tokenize(...)])      # the signals of a batch, as precompute stores them
student = cd.Student.from_store(store, llm="path/to/llm")
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported when first asked for: `import compodistill` alone loads neither torch nor zarr.
_HOMES = {
    "open_store": "compodistill.store.reader",
    "load_model": "compodistill.models",
    "tokenize": "compodistill.tokens",
    "capture": "compodistill.precompute.capture",
    "CaptureSettings": "compodistill.precompute.capture",
    "Student": "compodistill.train.student",
}
__all__ = ["CaptureSettings", "Student", "capture", "load_model", "open_store", "tokenize"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compodistill' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
