"""The commands of `cdist`, one module each; heavy imports stand inside the functions."""
