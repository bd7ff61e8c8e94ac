"""How a teacher's pass is run, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compodistill.errors import UsageError
from compodistill.store.spec import Codec, Rows

OnError = Literal["stop", "skip"]


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
        threads: CPU threads of a forward pass. Matrix products are split among them, which changes last bits, so
            the number is part of the fingerprint; more cores are used by more workers.
        on_error: what a sample that cannot be used does: stop the pass, or be left out and listed.
    """

    student_layers: int | None = None
    rows: Rows = "all"
    top_k: int = 64
    codec: Codec = "compact"
    batch_size: int = 8
    max_length: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    on_error: OnError = "stop"

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def samples_at_once(self) -> int:
        return 1 if self.device_type == "cpu" else self.batch_size

    @property
    def samples_ahead(self) -> int:
        """Samples read ahead, and encoded behind, in threads. A CPU worker has one core, where threads gain nothing."""
        return 0 if self.device_type == "cpu" else 2 * self.batch_size


@dataclass(frozen=True)
class ClusterOptions:
    """Where the pass is run.

    Attributes:
        workers: processes started on this machine; 1 is this process itself, 0 one for each GPU.
        scheduler: address of a running Dask scheduler (`tcp://...`, `tls://...`) whose workers are used instead.
        tls_ca, tls_cert, tls_key: PEM files for a `tls://` scheduler.
    """

    workers: int = 1
    scheduler: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""

    def __post_init__(self) -> None:
        tls = (self.tls_ca, self.tls_cert, self.tls_key)
        if self.scheduler and not self.scheduler.startswith(("tcp://", "tls://")):
            raise UsageError("a scheduler's address starts with tcp:// or tls://", where=self.scheduler)
        if self.scheduler.startswith("tls://") != any(tls) or any(tls) != all(tls):
            raise UsageError(
                "a tls:// scheduler needs --tls-ca, --tls-cert and --tls-key; nothing else takes them",
                where=self.scheduler,
            )
