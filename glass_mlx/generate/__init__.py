"""The generate command, `python -m glass_mlx.generate`.

The functions `generate` and `stream_generate` are in `glass_mlx.streaming`.
"""
