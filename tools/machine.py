"""What a measurement ran on: chip, memory, system, power, and whether the machine was busy."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx


def _said(*command: str) -> str:
    """What a command prints, or "" if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    return done.stdout.strip() if done.returncode == 0 else ""


def _chip() -> str:
    if platform.system() == "Darwin":
        return _said("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


def _power() -> str:
    """ "mains", "battery", or "unknown"."""
    if platform.system() == "Darwin":
        said = _said("pmset", "-g", "batt")
        return (
            "battery" if "Battery Power" in said else "mains" if "AC Power" in said else "unknown"
        )
    supplies = Path("/sys/class/power_supply").glob("*/online")
    try:
        online = [supply.read_text().strip() for supply in supplies]
    except OSError:
        online = []
    return "unknown" if not online else "mains" if "1" in online else "battery"


def machine() -> dict[str, str | int | float]:
    """The machine, for the record."""
    return {
        "chip": _chip() or "unknown",
        "cores": os.cpu_count() or 0,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "device": "GPU" if mx.default_device() == mx.gpu else "CPU",
        "power": _power(),
    }


def busy() -> str | None:
    """A warning if other work is running on this machine, or None."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.5 * cores:
        return f"the machine is busy (load {load:.1f} on {cores} cores): times are not worth much"
    return None


def throttled(speeds: list[float]) -> str | None:
    """A warning if the same work became slower from run to run, or None."""
    if len(speeds) > 1 and speeds[-1] < 0.9 * speeds[0]:
        loss = 100 * (1 - speeds[-1] / speeds[0])
        return f"dense decoding became {loss:.0f} % slower during the runs: throttled, or disturbed"
    return None
