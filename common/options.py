"""Options of the command line, checked against the configs that they are for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser, run

KINDS = {bool: ((bool,), "True or False"), int: ((int,), "a whole number"), float: ((int, float), "a number")}
"""For values that are of a kind in a config: which kinds an option may be, and what that is called."""


def check_options() -> None:
    """Refuse options of `python -m monai.bundle run` that no config has, or of another kind than there.

    MONAI takes any name, and `--smapler ddim` would sample with the default. Belongs in front of `run`; a run that was
    started from Python, whose caller has no command line to mistype, passes.

    Raises:
        ValueError: an unknown name, a word where a number or True or False belongs, or a fraction where a count does.
    """
    arguments = dict(_options(sys.argv[1:]))
    if "config_file" in arguments:
        check(arguments, ConfigParser.load_config_files(arguments["config_file"]))


def check(arguments: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse what `check_options` does, of options by name and a config with its overlays."""
    defaults = {name.lstrip("+~").partition("#")[0]: value for name, value in config.items()}
    known = defaults.keys() | inspect.signature(run).parameters.keys()
    for name, value in arguments.items():
        first, *inner = name.replace("::", "#").lstrip("+~").split("#")
        if first not in known and not first.startswith("_meta_"):
            near = get_close_matches(first, known, n=1)
            raise ValueError(f"no option --{name} here{f': did you mean --{near[0]}?' if near else ''}")
        default = None if inner else defaults.get(first)
        is_expression = isinstance(value, str) and value.startswith(("$", "@", "%"))
        if type(default) in KINDS and not is_expression:
            kinds, wanted = KINDS[type(default)]
            if type(value) not in kinds:
                raise ValueError(f"--{name} {value}: give {wanted}, such as {default}")


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Names and values as Python Fire, which MONAI reads its command line with, takes them."""
    for argument, after in pairwise((*arguments, "--")):
        if argument.startswith("--") and argument != "--":
            name, equals, value = argument[2:].partition("=")
            if not equals:
                value = "True" if after.startswith("--") else after
            yield name.replace("-", "_"), DefaultParseValue(value)
