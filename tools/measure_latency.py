"""Measure how fast a model decodes, dense and sliced: `glass_mlx.latency`."""

from glass_mlx.latency.__main__ import main

if __name__ == "__main__":
    main()
