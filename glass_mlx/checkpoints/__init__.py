"""Models by name: the built-in one, hub ids, folders and GGUF files."""
