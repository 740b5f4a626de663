"""Says, before a long run, whether the machines are what the run expects; every process of the run calls it at the same time.

  python launch/check.py --platform=tpu --devices=16 [--coordinator=HOST:PORT --processes=N --process=I]

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

# The oldest NVIDIA drivers (Linux) that the CUDA releases within JAX's two GPU builds run on.
DRIVERS = {"jax-cuda12-plugin": (525, 60), "jax-cuda13-plugin": (580, 65)}
EXTRAS = {"tpu": "tpu", "gpu": "cuda12"}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("tpu", "gpu", "cpu"), required=True)
    parser.add_argument("--devices", type=int, required=True, help="how many devices all processes have together")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    options = parser.parse_args(arguments)
    wrong = unfit_driver(installed(), driver()) if options.platform == "gpu" else None
    wrong = wrong or unfit_devices(options)
    if wrong:
        print(f"launch/check.py: {wrong}", file=sys.stderr)
    return int(wrong is not None)


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


def unfit_driver(releases: dict[str, str], driver: str | None) -> str | None:
    """What is wrong with JAX's GPU build on this driver, or None."""
    builds = [name for name in DRIVERS if name in releases]
    if driver is None:
        return "no NVIDIA driver answers on this machine (nvidia-smi); was a GPU asked for?"
    if not builds:
        return f'jax {releases.get("jax")} is installed without GPU support: pip install "jax[cuda12]=={releases.get("jax")}".'
    if len(builds) > 1:
        return f"both {' and '.join(builds)} are installed, and JAX takes one of them: pip uninstall the other with what came with it."
    found = tuple(int(part) for part in re.findall(r"\d+", driver)[:2])
    if found < DRIVERS[builds[0]]:
        least = ".".join(map(str, DRIVERS[builds[0]]))
        older = ' or install "jax[cuda12]" instead' if builds[0] == "jax-cuda13-plugin" and found >= DRIVERS["jax-cuda12-plugin"] else ""
        return f"{builds[0]} {releases[builds[0]]} needs an NVIDIA driver of {least} or newer, and this one is {driver}: renew it{older}."
    return None


def unfit_devices(options: argparse.Namespace) -> str | None:
    """Joins, counts and sums; what is wrong, or None."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import multihost_utils

    from mmjax.parallel.mesh import join_cluster

    releases = installed()
    listed = ", ".join(f"{name} {release}" for name, release in releases.items())
    try:
        if options.coordinator:
            jax.distributed.initialize(options.coordinator, options.processes, options.process)
        else:
            join_cluster()
        devices = jax.devices()
    except RuntimeError as error:
        fitting = f'pip install "jax[{EXTRAS[options.platform]}]=={releases["jax"]}"' if options.platform in EXTRAS else "see above"
        return (
            f"JAX finds no devices: {error}\n  Installed: {listed}. Either the build of JAX does not fit the machine ({fitting}), another program "
            "holds the devices (stop it), or a worker did not join (all must start within five minutes)."
        )
    if devices[0].platform != options.platform:
        extra = EXTRAS.get(options.platform, "cpu")
        return f"JAX runs on {devices[0].platform}, not on {options.platform} ({listed}): pip install \"jax[{extra}]=={releases['jax']}\"."
    if len(devices) != options.devices:
        return (
            f"{options.devices} devices are expected, and {jax.process_count()} processes see {len(devices)} ({devices[0].device_kind}): a worker is "
            "not part of the run, or the slice, topology or number of GPUs asked for is another one."
        )
    counts = multihost_utils.process_allgather(jnp.ones(jax.local_device_count()).sum())
    if int(counts.sum()) != options.devices:
        return f"the sum over all devices is {counts.sum()}, not {options.devices}: the links between the machines do not work (NCCL_DEBUG=INFO tells more)."
    if jax.process_index() == 0:
        print(f"{len(devices)} x {devices[0].device_kind} in {jax.process_count()} processes; {listed}")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
