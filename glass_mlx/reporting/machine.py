"""The machine that a measurement ran on: versions, hardware, power, and disturbances."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

# A warning is due above this load per core, below this share of the first run's speed, and if one
# round has more than this many times the speed-up of another.
_BUSY_LOAD = 0.5
_STEADY_SPEED = 0.9
_STEADY_SPEEDUP = 1.1


def made_with() -> dict[str, Any]:
    """Return the versions of the packages that compute, and the kind of machine."""
    return {
        "versions": {package: version(package) for package in ("glass-mlx", "mlx", "mlx-lm")},
        "machine": f"{platform.system()} {platform.machine()}",
    }


def describe_machine() -> dict[str, str | int | float]:
    """Return the hardware, operating system, Python version, MLX device and power source."""
    release = platform.release().partition("-")[0]  # the rest names somebody's own build
    return {
        "chip": _chip() or "unknown",
        "cores": os.cpu_count() or 0,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {release}",
        "python": platform.python_version(),
        "device": "GPU" if mx.default_device() == mx.gpu else "CPU",
        "power": _power(),
    }


def busy_warning() -> str | None:
    """Return a warning if other work is running on this machine, or None."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > _BUSY_LOAD * cores:
        return f"the machine is busy (load {load:.1f} on {cores} cores): times are unreliable"
    return None


def slowdown_warning(speeds: list[float]) -> str | None:
    """Return a warning if the same work became slower from run to run, or None.

    Args:
        speeds: the speed of dense decoding in each run, in tokens per second.
    """
    if len(speeds) > 1 and speeds[-1] < _STEADY_SPEED * speeds[0]:
        loss = 100 * (1 - speeds[-1] / speeds[0])
        return f"dense decoding became {loss:.0f} % slower during the runs: throttled, or disturbed"
    return None


def spread_warning(speedups: list[float]) -> str | None:
    """Return a warning if rounds of the same comparison had different speed-ups, or None."""
    least, most = min(speedups), max(speedups)
    if most > _STEADY_SPEEDUP * least:
        return f"rounds have speed-ups of {least:.2f} to {most:.2f}: disturbed"
    return None


def _command_output(*command: str) -> str:
    """Return the output of a command, or "" if the command is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _chip() -> str:
    """Return the processor's name, or "" if the system does not report it."""
    if platform.system() == "Darwin":
        return _command_output("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


def _power() -> str:
    """Return "mains", "battery" or "unknown"."""
    if platform.system() == "Darwin":
        status = _command_output("pmset", "-g", "batt")
        if "Battery Power" in status:
            return "battery"
        return "mains" if "AC Power" in status else "unknown"
    try:
        supplies = [
            file.read_text().strip() for file in Path("/sys/class/power_supply").glob("*/online")
        ]
    except OSError:
        supplies = []
    if not supplies:
        return "unknown"
    return "mains" if "1" in supplies else "battery"


def describe_model() -> dict[str, str | int]:
    """Return what identifies a kind of Mac, without serial numbers or names; {} elsewhere."""
    if platform.system() != "Darwin":
        return {}
    found: dict[str, str | int] = {"macos": platform.mac_ver()[0]}
    if model := _command_output("sysctl", "-n", "hw.model"):
        found["model"] = model
    displays = _command_output("system_profiler", "SPDisplaysDataType")
    if cores := re.search(r"Total Number of Cores: (\d+)", displays):
        found["gpu_cores"] = int(cores[1])
    return found


def describe_power() -> dict[str, str | int | bool]:
    """Return the power source and, where macOS tells, the battery's charge and thermal state."""
    state: dict[str, str | int | bool] = {"power": _power()}
    if platform.system() != "Darwin":
        return state
    if charge := re.search(r"(\d+)%", _command_output("pmset", "-g", "batt")):
        state["battery_percent"] = int(charge[1])
    # Macs that also have a high-power mode call it powermode, which is 2 for high power.
    if mode := re.search(r"\b(?:low)?powermode\s+(\d)", _command_output("pmset", "-g")):
        state["low_power_mode"] = mode[1] == "1"
    # Macs with Apple silicon report no limits, throttled or not.
    thermal = _command_output("pmset", "-g", "therm")
    if limits := re.findall(r"(\w*(?:Limit|CPUs|Level))\s*=\s*(\d+)", thermal):
        state["thermal"] = ", ".join(f"{name} {value}" for name, value in limits)
    return state


def power_warning(*states: dict[str, str | int | bool]) -> str | None:
    """Return a warning if a machine ran on its battery or saved power, or None.

    Args:
        *states: results of `describe_power`.
    """
    if any(state.get("low_power_mode") for state in states):
        return "low-power mode was on: times are those of a slower machine"
    if any(state["power"] == "battery" for state in states):
        return "the machine ran on its battery: it may have been slower"
    return None
