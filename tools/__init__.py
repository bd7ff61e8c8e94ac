"""The command line and every tool around it."""
