"""The measurement of a prior; the command is `python -m glass_mlx.calibrate`."""
