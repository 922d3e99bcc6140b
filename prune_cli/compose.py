"""Command line -> one plain config, or one sentence that says which override is wrong.

Hydra composes; where it refuses, the override at fault is found here, since Hydra's own messages
take many lines and suggest `+key`, which is never right in this program. No torch.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from prune_cli.errors import UserError
from prune_cli.published import Table, table_in
from prune_cli.settings import close_names, nearest

_PACKAGE = Path(__file__).parent
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

OPEN = "model.arguments."  # the arguments of a user's own network are settings that no file lists


def loader(config_dir: str | None = None) -> ConfigLoaderImpl:
    """The loader that Hydra is going to use. Raises UserError: `config_dir` is no folder."""
    search_path = create_config_search_path(str(CONF))
    if config_dir is not None:
        if not os.path.isdir(config_dir):
            raise UserError(f"--config-dir={config_dir}: there is no such folder")
        folder = f"file://{os.path.abspath(config_dir)}"
        search_path.prepend("command-line", folder, anchor=SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(search_path)


class Composer:
    """Composes the config of one job from its overrides."""

    def __init__(self, loader: ConfigLoaderImpl, config_name: str):
        self.loader = loader
        self.config_name = config_name

    def compose(self, lines: Sequence[str]) -> dict[str, Any]:
        """The resolved config as plain data. Raises UserError: an override cannot be right."""
        overrides = [self.parse(line) for line in lines]
        for override in overrides:
            _check_form(override)
            self._check_choice(override)
        plain = [spelled(o) for o in overrides]
        try:
            config = _resolved(self._load(plain))
        except UserError:
            raise
        except Exception as problem:  # Hydra raises ValueError and AssertionError too
            choices = self._load([line for line, o in zip(plain, overrides) if self.is_choice(o)])
            known = OmegaConf.to_container(choices, resolve=False)
            for override in overrides:
                _check_key(override, known, self.groups)
            raise UserError(first_line(problem)) from problem
        for override in overrides:
            if not of_hydra(override) and override.type is not OverrideType.CHANGE:
                raise UserError(f"{override.input_line}: it exists already; write it without the +")
        return config

    def parse(self, line: str) -> Override:
        """One override. Raises UserError: it is not of the form name=value."""
        try:
            return OverridesParser.create(config_loader=self.loader).parse_override(line)
        except Exception as problem:  # Hydra's parser lets errors of int() and others through
            raise UserError(self._unreadable(line)) from problem

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The options of each group."""
        files = self.loader.repository  # the loader's own methods copy the whole search path each time
        names = [n for n in files.get_group_options("", ObjectType.GROUP) if n != "hydra"]
        names += [f"hydra/{n}" for n in files.get_group_options("hydra", ObjectType.GROUP)]

        def options(group: str) -> list[str]:
            inner = files.get_group_options(group, ObjectType.GROUP)
            nested = [f"{name}/{option}" for name in inner for option in options(f"{group}/{name}")]
            return sorted(files.get_group_options(group, ObjectType.CONFIG)) + sorted(nested)

        return {name: options(name) for name in names}

    def is_choice(self, override: Override) -> bool:
        """Whether the override chooses an option of a group (else it sets a value)."""
        return override.key_or_group in self.groups and not isinstance(override.value(), dict)

    def chosen(self, lines: Sequence[str]) -> dict[str, Any]:
        """The config, not resolved, that the group choices among the overrides make: options that
        are not there, and everything else, are left out."""
        overrides = [self.parse(line) for line in lines]
        there = [o for o in overrides if self.is_choice(o) and o.value() in self.groups[o.key_or_group]]
        return self._choices(tuple(o.input_line.lstrip("+") for o in there))

    @cache
    def _choices(self, lines: tuple[str, ...]) -> dict[str, Any]:
        return OmegaConf.to_container(self._load(list(lines)), resolve=False)

    def _load(self, lines: list[str]) -> DictConfig:
        return self.loader.load_configuration(self.config_name, lines, run_mode=RunMode.RUN)

    def _check_choice(self, override: Override) -> None:
        group, value = override.key_or_group, override.value()
        if self.is_choice(override) and value not in self.groups[group]:
            allowed = nearest(_shown(value), self.groups[group])
            raise UserError(f"{override.input_line}: there is no such {group.removeprefix('hydra/')}; {allowed}")

    def _unreadable(self, line: str) -> str:
        if "=" in line:
            return f"{line}: cannot be read; a list is written name=[1,2], text with special characters name='text'"
        owners = [f"{group}={line}" for group, options in self.groups.items() if line in options]
        example = owners[0] if owners else "method=stripe"
        return f"{line or chr(39) * 2}: an override is written name=value, for example {example}"


def composed(lines: Sequence[str]) -> dict[str, Any]:
    """The config of a command line that is not Hydra's own. Raises UserError: an override cannot be right."""
    version.setbase("1.3")
    return Composer(loader(), "config").compose(lines)


def shipped_tables() -> list[Table]:
    """The published tables that files in conf/experiment reproduce, by name."""
    contents = [OmegaConf.to_container(OmegaConf.load(file)) for file in sorted(CONF.glob("experiment/**/*.yaml"))]
    return [table for content in contents if (table := table_in(content)) is not None]


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message, after the setting it is about where that is known."""
    cause = problem if isinstance(problem, OmegaConfBaseException) else problem.__cause__ or problem
    message = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    key = getattr(cause, "full_key", None)
    return f"{key}: {message}" if key else message


def spelled(override: Override) -> str:
    """The override as Hydra wants it: a + where the key is new, and only there."""
    if of_hydra(override):
        return override.input_line
    return "++" * override.key_or_group.startswith(OPEN) + override.input_line.lstrip("+")


def of_hydra(override: Override) -> bool:
    """Whether the override is about Hydra itself, not about a result."""
    return override.key_or_group.startswith(("hydra.", "hydra/"))


def _check_form(override: Override) -> None:
    line, key = override.input_line, override.key_or_group
    if override.is_sweep_override():
        raise UserError(f"{line}: several values need -m (a list is written [1,2])")
    if override.package is not None:
        raise UserError(f"{line}: a group cannot be moved with @; write {key}=NAME")
    if override.is_delete() and not of_hydra(override):
        raise UserError(f"{line}: nothing can be removed from the settings; write {key}=VALUE to change it")


def _resolved(config: DictConfig) -> dict[str, Any]:
    with open_dict(config):
        del config["hydra"]
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def _check_key(override: Override, known: Mapping, groups: Mapping[str, Sequence[str]]) -> None:
    """Refuse an override that sets what is not in the config `known`."""
    if override.key_or_group in groups and not isinstance(override.value(), dict):
        return
    for path, value in _leaves(_parts(override.key_or_group), override.value()):
        node = known
        for depth, part in enumerate(path):
            if not (isinstance(node, Mapping) and part in node or _is_index(node, part)):
                hint = _suggestion(path, depth, node, known, groups)
                raise UserError(f"{override.input_line}: there is no such setting; {hint}")
            node = node[int(part)] if isinstance(node, list) else node[part]
        if isinstance(node, Mapping) and node and not isinstance(value, Mapping):
            name = ".".join(path)
            example = f"{name}.{next(iter(node))}"
            raise UserError(f"{override.input_line}: {name} holds several settings; set one, as in {example}")


def _parts(key: str) -> list[str]:
    return [part for part in re.split(r"[.\[\]]", key) if part]


def _leaves(path: list[str], value: Any) -> Iterator[tuple[list[str], Any]]:
    """The paths that a value, perhaps a nested mapping, sets."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves([*path, str(key)], inner)
    else:
        yield path, value


def _is_index(node: Any, part: str) -> bool:
    return isinstance(node, list) and part.isdecimal() and int(part) < len(node)


def _suggestion(path: list[str], depth: int, node: Any, known: Mapping, groups: Mapping) -> str:
    """The nearest names: among the siblings first, then by the last word anywhere in the config."""
    parent = ".".join(path[:depth])
    siblings = list(node) if isinstance(node, Mapping) else []
    if not depth:
        siblings = [name for name in {**known, **groups} if not name.startswith("hydra")]
    if not close_names(path[depth], siblings):
        paths = [".".join(p) for p, _ in _leaves([], known) if p[0] != "hydra"]
        close = [p for p in paths if close_names(path[-1], [p.rpartition(".")[2]])]
        if close:
            return nearest(close[0], close)
    return nearest(path[depth], siblings or [parent])


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
