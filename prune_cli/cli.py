"""The command `prune-cli`: Hydra with one sentence instead of a traceback.

    prune-cli method=stripe ratio=0.5        one job
    prune-cli -m ratio=0.3,0.5 seed=0,1      one job for each combination
    prune-cli plan method=fp ratio=0.5       what would be removed, before any training
    prune-cli bench kernel                   what the stripe-wise kernels are worth on this machine
    prune-cli report outputs/runs            finished runs as one table, beside the paper's numbers

Exit codes: 0 done, 1 a run failed, 2 the command cannot be right, 130 interrupted.
"""

import argparse
import os
import signal
import sys
from importlib import import_module
from string import Template

from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.utils import env_override, setup_globals
from omegaconf import OmegaConf

from prune_cli.compose import CONF, Composer, first_line, loader, spelled
from prune_cli.errors import UserError
from prune_cli.job import INTERRUPTED, hydra_job, say
from prune_cli.rows import of_one_row, table_of
from prune_cli.sweep import sweep

COMMANDS = ("bench", "plan", "report")  # modules in commands/, by the first word of the command line


def main() -> int:
    """Run the command line in `sys.argv` and return the exit code, or raise SystemExit with it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    debugging = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        if sys.argv[1:2] and sys.argv[1] in COMMANDS:  # Hydra would take it for a broken override
            command = import_module(f"prune_cli.commands.{sys.argv[1]}")
            return command.main(sys.argv[2:])
        parser = get_args_parser()
        parser.error = _refuse
        arguments = parser.parse_intermixed_args()
        with env_override({"HYDRA_FULL_ERROR": "1"}):  # exceptions come here instead of being printed
            return _run(parser, arguments)
    except KeyboardInterrupt:
        say(INTERRUPTED)
        return 130
    except UserError as problem:
        say(str(problem))
        return 2
    except BrokenPipeError:  # who reads our output has read enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so at exit
        return 1
    except Exception as problem:  # of Hydra: a broken file in conf/, a plugin, a wrong pair of options
        if debugging:
            raise
        say(first_line(problem))
        return 2


def _refuse(message: str) -> None:
    raise UserError(f"{message}; --help lists what there is")


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Check the overrides, then do what the options say; all but help and sweeps is Hydra's."""
    version.setbase("1.3")
    setup_globals()
    if arguments.config_path is not None:
        raise UserError("--config-path: the settings of prune-cli cannot be replaced; --config-dir adds to them")
    config_name = arguments.config_name or "config"
    composer = Composer(loader(arguments.config_dir), config_name)
    if arguments.help:
        print(_help(composer))
        return 0
    overrides = [] if arguments.shell_completion else [composer.parse(line) for line in arguments.overrides]
    other_sweeper = any(o.key_or_group == "hydra/sweeper" for o in overrides)
    showing = arguments.cfg or arguments.info or arguments.hydra_help or arguments.shell_completion
    table = table_of(composer, arguments.overrides) if overrides else None
    if not (showing or other_sweeper) and (arguments.multirun or table):
        return sweep(composer, arguments.overrides)
    if table:
        lines = of_one_row(composer, arguments.overrides, "hydra/sweeper" if other_sweeper else "")
        arguments.overrides, overrides = lines, [composer.parse(line) for line in lines]
    if overrides and not (arguments.multirun or arguments.hydra_help):
        composer.compose(arguments.overrides)
    if overrides:
        arguments.overrides = [spelled(override) for override in overrides]
    _run_hydra(arguments, parser, hydra_job, config_path=str(CONF), config_name=config_name)
    return 0


def _help(composer: Composer) -> str:
    """The text of --help. Hydra would compose and copy the config for it, for most of a second."""
    text = OmegaConf.load(CONF / "hydra/help/prune_cli.yaml").template
    groups = {name: options for name, options in composer.groups.items() if not name.startswith("hydra/")}
    listed = "\n".join(f"  {name + ':':<12}{', '.join(options)}" for name, options in groups.items())
    return Template(text).substitute(APP_CONFIG_GROUPS=listed)
