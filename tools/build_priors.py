"""Measure the global prior of a model and write it to a file; see `glass_mlx.calibrate`."""

from glass_mlx.calibrate import main

if __name__ == "__main__":
    main()
