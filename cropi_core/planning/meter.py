"""Measure the peak of memory between two moments, of this process or of its GPU."""

from pathlib import Path

import torch

from cropi_core.system import peak_resident, resident

CLEAR = Path("/proc/self/clear_refs")


class Meter:
    """Bytes in use, and their peak since the last :meth:`reset`.

    For the process, this is the resident size. Systems other than Linux cannot reset the peak: there it is the peak
    since the process began, and growth below it is not visible; ``exact`` is then False.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.exact = device.type == "cuda" or CLEAR.exists()

    @property
    def memory_kind(self) -> str:
        """Return what is measured: ``process`` or ``gpu``."""
        return "gpu" if self.device.type == "cuda" else "process"

    def now(self) -> float:
        """Return the bytes in use."""
        if self.device.type == "cuda":
            return float(torch.cuda.memory_allocated(self.device))
        return resident()

    def peak(self) -> float:
        """Return the peak of bytes in use since the last reset."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return peak_resident()

    def reset(self) -> None:
        """Reset the peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR.exists():
            CLEAR.write_text("5", encoding="ascii")  # proc(5): resets the resident set's high-water mark
