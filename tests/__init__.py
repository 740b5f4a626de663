"""Tests compile far more than they compute, so the machine code need not be good: with these options of XLA a training step compiles in a
quarter of the time. Without fused multiply-adds, which come and go with what XLA fuses, equal arithmetic gives equal bits."""

CHEAP_COMPILES: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_max_isa": "AVX",
}
CHEAP_XLA_FLAGS = " ".join(f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in CHEAP_COMPILES.items())
