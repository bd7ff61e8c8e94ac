"""Collects what `cdist doctor` shows, as plain data."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from compodistill import __version__
from compodistill.tools.doctor.folder import folder_checks
from compodistill.tools.doctor.kernels import attention_kernels


def doctor_report(folder: Path) -> dict[str, Any]:
    """Versions, devices, kernels and the write test in `folder`, as JSON-ready values."""
    required, optional = package_versions()
    return {
        "cdist": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": required,
        "optional_packages": optional,
        "devices": devices(),
        "attention_kernels": attention_kernels(),
        "folder": {"path": str(folder), **folder_checks(folder)},
    }


def problems(report: dict[str, Any]) -> list[str]:
    """What keeps cdist from working here; absent optional packages and GPU kernels do not."""
    found = [f"package {name} is missing" for name, version in report["packages"].items() if version is None]
    found += [f"{name}: {verdict}" for name, verdict in report["folder"].items() if verdict.startswith("no: ")]
    return found


def package_versions() -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Installed versions of what the package requires, and of what its extras for use (not for development) name."""
    try:
        requirements = metadata.requires("compodistill") or []
    except metadata.PackageNotFoundError:  # run from the sources without an installation
        requirements = ["torch", "transformers", "zarr"]
    required: dict[str, str | None] = {}
    optional: dict[str, str | None] = {}
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        extra = re.search(r"""extra\s*==\s*['"](\w+)['"]""", requirement)
        if name == "compodistill" or (extra and extra[1] == "dev"):
            continue
        (optional if extra else required)[name] = _version(name)
    return required, optional


def devices() -> dict[str, Any]:
    """Processor cores this process may use, torch's threads, and GPUs by name."""
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {"cores": cores, "torch_threads": torch.get_num_threads(), "cuda": gpus,
            "mps": torch.backends.mps.is_available()}  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
