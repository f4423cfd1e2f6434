"""How fast a model decodes, dense and sliced; `python -m glass_mlx.latency` measures it."""
