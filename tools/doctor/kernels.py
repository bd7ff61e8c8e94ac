"""Which fused attention kernels hand out their log-sum-exp here. Each is run on a small input, never only looked up."""

from __future__ import annotations

from collections.abc import Callable

TOLERANCE = 1e-4


def attention_kernels() -> dict[str, str]:
    """Kernel name -> "ok", or why it is not available. `softmax` needs no kernel and is always there."""
    found = {name: _verdict(probe) for name, probe in _PROBES.items()}
    found["softmax"] = "ok (fallback, slower)"
    return found


def _verdict(probe: Callable[[], str]) -> str:
    try:
        return probe()
    except Exception as error:  # an absent kernel shows as any kind of error, from AttributeError to a driver's
        reason = str(error).strip().splitlines()
        return f"no: {type(error).__name__}: {reason[0] if reason else ''}"[:160]


def _cpu_flash() -> str:
    import torch

    q, k, v, lse = _inputs("cpu", torch.float32)
    _, ours, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False)
    return _compare(ours, lse)


def _cuda_efficient() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no: no CUDA device"
    q, k, v, lse = _inputs("cuda", torch.float16)
    _, ours, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return _compare(ours[..., : lse.shape[-1]], lse, 1e-2)


def _xformers() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no: its operators need a CUDA device"  # its own is_available() can say yes without one
    from xformers.ops import memory_efficient_attention_forward_requires_grad

    q, k, v, lse = _inputs("cuda", torch.float16)
    _, ours = memory_efficient_attention_forward_requires_grad(*(x.transpose(1, 2) for x in (q, k, v)))
    return _compare(ours[..., : lse.shape[-1]], lse, 1e-2)


def _inputs(device: str, dtype):  # type: ignore[no-untyped-def]
    """q, k, v (1, H, T, D) and the log-sum-exp (1, H, T) computed the plain way."""
    import torch

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 32, generator=generator).to(device, dtype) for _ in range(3))
    return q, k, v, (q.float() @ k.float().mT * 32**-0.5).logsumexp(-1)


def _compare(ours, expected, tolerance: float = TOLERANCE) -> str:  # type: ignore[no-untyped-def]
    error = float((ours.float() - expected).abs().max())
    return "ok" if error <= tolerance else f"no: its log-sum-exp is off by {error:.1e}"


_PROBES: dict[str, Callable[[], str]] = {
    "cpu-flash": _cpu_flash,
    "torch-cuda": _cuda_efficient,
    "xformers": _xformers,
}
