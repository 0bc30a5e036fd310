"""Kernels come with the next commits."""

DEVICES: dict[str, tuple[str, ...]] = {}
