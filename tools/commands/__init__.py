"""One module for each command, with the click command as its `command`; the table is in tools/cli.py."""
