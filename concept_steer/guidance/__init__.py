"""Guidance methods, one paper a file: how predictions are combined in place of plain classifier-free guidance."""
