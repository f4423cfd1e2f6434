"""A server with the endpoints of `mlx_lm.server`, which are those of OpenAI's API."""
