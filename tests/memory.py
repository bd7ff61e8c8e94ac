"""Peak resident memory of this process. (`getrusage` would report the parent's peak until a child exceeds it.)"""

from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_kib() -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))


def reset_peak() -> int:
    """Forget the peak so far; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kib()
