"""Run `glass_mlx.fidelity`, which measures how close sliced models stay to the dense model."""

from glass_mlx.fidelity.__main__ import main

if __name__ == "__main__":
    main()
