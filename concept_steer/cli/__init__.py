"""The command line. One file per family of commands; torch is imported only once a command runs."""

from .main import main

__all__ = ["main"]
