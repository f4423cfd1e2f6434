"""Run `glass_mlx.calibrate`, which measures the global prior of a model."""

from glass_mlx.cli import run_command

if __name__ == "__main__":
    run_command("calibrate")
