"""Run `glass_mlx.fidelity`, which measures how close sliced models stay to the dense model."""

from glass_mlx.cli import run_command

if __name__ == "__main__":
    run_command("fidelity")
