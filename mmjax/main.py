"""The command.

  python -m mmjax.main --config=configs/NAME.py[:WORD,KEY=VALUE,...] [--job=JOB] [--workdir=DIR] [--config.KEY=VALUE ...]

  --job      train (default), evaluate, generate, chat, export or plan
  --workdir  where checkpoints, figures and pictures go; workdirs/NAME unless given. Jobs other than train and plan may
             leave --config out: the recipe the workdir was trained with is used.
  --config.a.b=v   overrides one field of the recipe

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

JOBS = ("train", "evaluate", "generate", "chat", "export", "plan")


def main(arguments: list[str]) -> int:
    """Runs one job; returns the exit code."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0 if arguments else 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log in a file can be followed
    keep_freed_memory()
    try:
        recipe, job, workdir = read_command(arguments)
        importlib.import_module(f"mmjax.jobs.{job}").run(recipe, workdir)
    except (UserError, flags.Error) as error:
        print(f"mmjax: {error}", file=sys.stderr)
        return 1
    return 0


def read_command(arguments: list[str]) -> tuple[Recipe, str, Path]:
    """The validated recipe, the job and the workdir. Raises UserError or flags.Error for what cannot be done."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "path of a recipe, with arguments after a colon", flag_values=values)
    flags.DEFINE_enum("job", "train", JOBS, "what to do", flag_values=values)
    flags.DEFINE_string("workdir", None, "where checkpoints and figures go", flag_values=values)
    _, *rest = values(["mmjax", *arguments], known_only=True)
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


def _override(config: ConfigDict, arguments: list[str]) -> ConfigDict:
    """`config` with every --config.KEY=VALUE of the command line."""
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
