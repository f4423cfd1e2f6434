"""Run `glass_mlx.latency`, which measures how fast a model decodes, dense and sliced."""

from glass_mlx.cli import run_command

if __name__ == "__main__":
    run_command("latency")
