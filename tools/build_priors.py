"""Measure the global prior of a model and write it to a file: `glass_mlx.calibration`."""

from glass_mlx.calibration import main

if __name__ == "__main__":
    main()
