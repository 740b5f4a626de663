"""Tests compile far more than they compute, so the machine code need not be good: with these options of XLA a training step compiles in a
quarter of the time."""

CHEAP_COMPILES: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}
CHEAP_XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in CHEAP_COMPILES.items())
