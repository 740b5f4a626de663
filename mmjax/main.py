"""The command.

  python -m mmjax.main --config=configs/NAME.py[:WORD,KEY=VALUE,...] [--job=JOB] [--workdir=DIR] [--config.KEY=VALUE ...]

  --job      train (default), evaluate, generate, chat, export or plan
  --workdir  where checkpoints, figures and pictures go; workdirs/NAME unless given. Jobs other than train and plan may
             leave --config out: the recipe the workdir was trained with is used.
  --config.a.b=v   overrides one field of the recipe
  --config.mesh=M  the mesh of devices: auto, the name of a TPU slice such as v5e:16x16, or sizes such as fsdp=64,tensor=4
  --coordinator=HOST:PORT --processes=N --process=I
             this is process I (from 0) of N, and process 0 listens at HOST:PORT. Not needed where SLURM, Open MPI, Kubernetes or a
             TPU pod says it; --processes=1 keeps a process alone there
  --heartbeat=30 --start=300
             seconds after which a process that is not heard of counts as dead, and for which the others are waited for at the start

The exit code is 0 only if the job did what was asked.
"""

from __future__ import annotations

import difflib
import importlib
import io
import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from mmjax import config_checks
from mmjax.allocator import keep_freed_memory
from mmjax.config import Recipe, from_config_dict, read_recipe, to_config_dict
from mmjax.config_parsing import dotted_keys, nearest, unknown_keys
from mmjax.errors import UserError
from mmjax.parallel import cluster
from mmjax.parallel.presets import mesh_sizes

JOBS = ("train", "evaluate", "generate", "chat", "export", "plan")
ALONE = ("chat", "plan")  # jobs of one process


def main(arguments: list[str]) -> int:
    """Runs one job; returns the exit code."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0 if arguments else 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log in a file can be followed
    keep_freed_memory()
    try:
        values, rest = _flags(arguments)
        asked = cluster.Asked(values.coordinator, values.processes, values.process, values.heartbeat, values.start)
        if values.job in ALONE and not asked.alone:
            raise UserError(f"--job={values.job} runs in one process: start it once, with --processes=1 or where there is no cluster.")
        with cluster.joined(asked):
            recipe, job, workdir = _command(values, rest)
            importlib.import_module(f"mmjax.jobs.{job}").run(recipe, workdir)
    except (UserError, flags.Error) as error:
        print(f"mmjax: {error}", file=sys.stderr)
        return 1
    return 0


def read_command(arguments: list[str]) -> tuple[Recipe, str, Path]:
    """The validated recipe, the job and the workdir. Raises UserError or flags.Error for what cannot be done."""
    return _command(*_flags(arguments))


def _flags(arguments: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """The flags of `main`, and what is left: overrides."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "path of a recipe, with arguments after a colon", flag_values=values)
    flags.DEFINE_enum("job", "train", JOBS, "what to do", flag_values=values)
    flags.DEFINE_string("workdir", None, "where checkpoints and figures go", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("processes", None, "how many processes there are", flag_values=values)
    flags.DEFINE_integer("process", None, "which one this is, from 0", flag_values=values)
    flags.DEFINE_integer("heartbeat", cluster.HEARTBEAT, "seconds until a silent process counts as dead", flag_values=values)
    flags.DEFINE_integer("start", cluster.START, "seconds to wait for the others at the start", flag_values=values)
    _, *rest = values(["mmjax", *arguments], known_only=True)
    return values, rest


def _command(values: flags.FlagValues, rest: list[str]) -> tuple[Recipe, str, Path]:
    """See `read_command`."""
    if values.workdir is not None and "://" in values.workdir:
        raise UserError(f"--workdir={values.workdir} is no folder: mount it, and name the folder (launch/README.md, Buckets).")
    if values.config is not None:
        config = _load(values.config)
    elif values.workdir is not None and values.job != "train":
        config = to_config_dict(read_recipe(values.workdir))
    else:
        raise UserError("no recipe: say --config=configs/NAME.py (--help tells more).")
    recipe = from_config_dict(_override(config, rest))
    missing = config_checks.missing_files(recipe, values.job)
    if missing:
        raise UserError("Files are missing:\n" + "\n".join(f"  {line}" for line in missing))
    return recipe, values.job, Path(values.workdir or f"workdirs/{recipe.name or 'unnamed'}")


def _load(argument: str) -> ConfigDict:
    """The ConfigDict that the file's get_config returns for what follows the colon."""
    path = Path(argument.split(":", 1)[0])
    if not path.is_file():
        others = sorted(str(file) for file in path.parent.glob("*.py") if file.stem != "__init__")
        near = difflib.get_close_matches(str(path), others, n=1)
        hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(others)}." if others else ""
        raise UserError(f"--config: {path} does not exist.{hint}")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", argument, flag_values=values, lock_config=False, sys_argv=["mmjax"])
    values(["mmjax"])
    return values.config


def _mesh(argument: str) -> list[str]:
    """--config.mesh=... as a setting of each axis; any other argument as it is."""
    found = re.fullmatch(r"--?config\.mesh=(.*)", argument)
    return [f"--config.mesh.{axis}={size}" for axis, size in mesh_sizes(found[1]).items()] if found else [argument]


def _override(config: ConfigDict, arguments: list[str]) -> ConfigDict:
    """`config` with every --config.KEY=VALUE of the command line."""
    arguments = [spelled for argument in arguments for spelled in _mesh(argument)]
    named = [found[1] for argument in arguments if (found := re.match(r"--?(?:no)?config\.([^=]+)", argument))]
    before = config.to_dict()
    unknown = unknown_keys(Recipe, before, named)
    if unknown:
        known = dotted_keys(before)
        raise UserError(
            "\n".join(
                f"--config.{key}: the recipe has no key {key!r}; the nearest one is {nearest(key, known)}." for key in unknown
            )
        )
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config",
            config,
            flag_values=values,
            lock_config=False,
            accept_new_attributes=True,
            sys_argv=["mmjax", *arguments],
        )
    except ValueError as error:  # a key that is no sequence of names, such as a glob
        raise UserError(f"{error} Give the dictionary it belongs to as a whole: --config.KEY=\"{{'name': value}}\".") from None
    _, *rest = values(["mmjax", *arguments])
    if rest:
        raise UserError(f"{' '.join(rest)!r} is neither a flag nor the value of one (--help tells more).")
    return values.config


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
