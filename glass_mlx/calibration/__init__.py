"""Measuring a prior; `python -m glass_mlx.calibrate` is the command."""
