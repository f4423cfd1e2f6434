"""Run `glass_mlx.calibrate`, which measures the global prior of a model."""

from glass_mlx.calibrate import main

if __name__ == "__main__":
    main()
