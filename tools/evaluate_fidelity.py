"""Measure how close sliced models stay to the dense one: `glass_mlx.fidelity`."""

from glass_mlx.fidelity.__main__ import main

if __name__ == "__main__":
    main()
