"""Run `glass_mlx.latency`, which measures how fast a model decodes, dense and sliced."""

from glass_mlx.latency.__main__ import main

if __name__ == "__main__":
    main()
