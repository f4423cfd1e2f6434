"""Global priors: measured once for each model, stored in one file, and checked when loaded."""
