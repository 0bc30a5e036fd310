"""No Triton kernel yet."""

DEVICES: dict[str, tuple[str, ...]] = {}
