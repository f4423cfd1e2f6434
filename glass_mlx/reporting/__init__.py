"""Shared by all measurements: the machine they ran on, Markdown tables, figures."""
