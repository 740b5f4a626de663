"""Eight simulated CPU devices for every test, and the places of data that is not part of the project."""

import gc
import os
from pathlib import Path

from tests import CHEAP_XLA_FLAGS

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {CHEAP_XLA_FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")

# Tracing and lowering make objects by the million, and each full collection goes through all programs that are kept: seldom, then.
gc.set_threshold(100_000, 20, 20)

SHARED = Path(__file__).resolve().parents[2] / "shared"


MAPS = Path("/proc/self/maps")  # of Linux
MANY = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Lets compiled programs go, between files, before their memory maps come near the system's limit (65,530 for a process), at which
    compiling crashes."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
        gc.collect()


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"needs the reference {name}, which are not part of the project ({folder} is absent)")
    return folder


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of reference weights, inputs and outputs."""
    return _shared("goldens")


@pytest.fixture(scope="session")
def data_kit() -> Path:
    """The folder of real data."""
    return _shared("data")


@pytest.fixture
def one_device(monkeypatch):
    """The first of the eight devices alone: a program for all of them takes longer to compile and to run, and not every run is about them."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
