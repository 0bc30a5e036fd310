"""No C++ kernel yet."""

DEVICES: dict[str, tuple[str, ...]] = {}
