"""The command line, `lorkd`: it reads arguments and calls the other rooms, which do the work."""

from lorkd_monai.cli.commands import main

__all__ = ["main"]
