"""The command line, `lorkd`: it reads arguments and calls; the work stands in the rooms below."""

from lorkd_monai.cli.commands import main

__all__ = ["main"]
