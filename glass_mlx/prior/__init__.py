"""The global prior of a model: its file, the search for it, and its display."""
