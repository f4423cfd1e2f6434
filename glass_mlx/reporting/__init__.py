"""What measurements share: the machine they ran on, Markdown tables, figures."""
