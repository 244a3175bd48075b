"""Name of the device that a run's numbers were computed on."""

from __future__ import annotations

import platform

import torch


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [platform.processor() or platform.machine()]
    try:
        with open("/proc/cpuinfo") as handle:
            names = [line.partition(":")[2].strip() for line in handle if line.startswith("model name")] or names
    except OSError:
        pass  # not Linux: keep the architecture's name
    return f"{names[0]}, {torch.get_num_threads()} threads"
