"""`python -m glass_mlx COMMAND` runs the same commands as `glass-mlx COMMAND`."""

from glass_mlx.cli import main

if __name__ == "__main__":
    main()
