"""How close a sliced model stays to the dense one; `python -m glass_mlx.fidelity` measures it."""
