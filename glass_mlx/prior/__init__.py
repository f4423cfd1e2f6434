"""The global prior of a model: its file, where it is found, and what it says."""
