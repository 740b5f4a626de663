"""Says, before a long run, whether the machines are what the run expects; every process of the run calls it at the same time.

  python -m launch.check --platform=tpu --devices=16 [--coordinator=HOST:PORT --processes=N --process=I]

It joins the cluster as mmjax.main does, counts the devices, and sums one number over all of them, so that the links between them have
been used once. One line is printed by process 0; the exit code is 0 if all is well. Otherwise the message says what to change.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from mmjax.errors import UserError
from mmjax.parallel import cluster

# The oldest NVIDIA drivers (Linux) that the CUDA releases within JAX's two GPU builds run on.
DRIVERS = {"jax-cuda12-plugin": (525, 60), "jax-cuda13-plugin": (580, 65)}
EXTRAS = {"tpu": "tpu", "gpu": "cuda12", "cpu": "cpu"}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("tpu", "gpu", "cpu"), required=True)
    parser.add_argument("--devices", type=int, required=True, help="how many devices all processes have together")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    options = parser.parse_args(arguments)
    try:
        if options.platform == "gpu":
            check_driver(installed(), driver())
        with cluster.joined(cluster.Asked(options.coordinator, options.processes, options.process)):
            check_devices(options.platform, options.devices)
    except UserError as error:
        print(f"launch/check.py: {error}", file=sys.stderr)
        return 1
    return 0


def installed() -> dict[str, str]:
    """The releases of JAX and its builds for accelerators that are installed."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu", *DRIVERS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def driver() -> str | None:
    """The release of the NVIDIA driver, as 550.54.15; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else None


def check_driver(releases: dict[str, str], driver: str | None) -> None:
    """Raises UserError where JAX's GPU build does not fit this driver."""
    builds = [name for name in DRIVERS if name in releases]
    if driver is None:
        raise UserError("no NVIDIA driver answers on this machine (nvidia-smi); was a GPU asked for?")
    if not builds:
        raise UserError(f'jax {releases["jax"]} is installed without GPU support: pip install "jax[cuda12]=={releases["jax"]}".')
    if len(builds) > 1:
        raise UserError(
            f"both {' and '.join(builds)} are installed, and JAX takes one of them: pip uninstall the other one and its -pjrt."
        )
    found = tuple(int(part) for part in re.findall(r"\d+", driver)[:2])
    if found < DRIVERS[builds[0]]:
        least = ".".join(map(str, DRIVERS[builds[0]]))
        instead = ', or install "jax[cuda12]" instead' if found >= DRIVERS["jax-cuda12-plugin"] else ""
        raise UserError(
            f"{builds[0]} {releases[builds[0]]} needs an NVIDIA driver of {least} or newer, and this one is {driver}: renew it{instead}."
        )


def check_devices(platform: str, expected: int) -> None:
    """Counts the devices of all processes and sums over them. Raises UserError where something is not as expected."""
    releases = installed()
    listed = ", ".join(f"{name} {release}" for name, release in releases.items())
    fitting = f'pip install "jax[{EXTRAS[platform]}]=={releases["jax"]}"'
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise UserError(
            f"JAX finds no devices: {error}\n  Installed: {listed}. Either the build of JAX does not fit the machine ({fitting}), "
            "or another program holds the devices (stop it), or another worker of the slice did not start."
        ) from error
    if devices[0].platform != platform:
        raise UserError(f"JAX runs on {devices[0].platform}, not on {platform} ({listed}): {fitting}.")
    if len(devices) != expected:
        raise UserError(
            f"{expected} devices are expected, and {jax.process_count()} processes see {len(devices)} ({devices[0].device_kind}): "
            "a worker is not part of the run, or the slice, topology or number of GPUs asked for is another one."
        )
    counted = int(multihost_utils.process_allgather(jnp.ones(jax.local_device_count()).sum()).sum())
    if counted != expected:
        raise UserError(
            f"the sum over all devices is {counted}, not {expected}: the links between the machines do not work "
            "(NCCL_DEBUG=INFO tells more)."
        )
    if jax.process_index() == 0:
        print(f"{len(devices)} x {devices[0].device_kind} in {jax.process_count()} processes; {listed}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
