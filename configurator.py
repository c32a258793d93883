"""How do plain config files and --key=value become a checked, frozen dataclass?

    @dataclass(frozen=True)
    class TrainConfig:
        batch_size: int = 12        # windows in one micro-batch

    cfg = configure(TrainConfig, ["config/small.py", "--batch_size=4"])

A config file is Python that leaves `key = value` lines behind; it may import and compute. Names
that start with an underscore are its own. The command line wins over files, later files over
earlier ones.
"""
import argparse
import dataclasses
import difflib
import inspect
import re
import runpy
import sys
import traceback
import types
import typing
from pathlib import Path

HERE = Path(__file__).resolve().parent


def configure(cls, argv, doc=""):
    """Return `cls(**settings)` from config files and --key=value arguments.

    `cls` is a dataclass whose fields are int, float, bool or str, or one of these or None. If it
    has a field `files`, arguments that do not end in .py go there. Raises ValueError that names the
    setting and what would work.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    parser = _parser(cls, fields, doc)
    given, unknown = parser.parse_known_intermixed_args([_spell_out(arg, fields) for arg in argv])
    # argparse takes an unknown setting whose value has a space for a file
    unknown += [p for p in given.positional if p.startswith("-")]
    if unknown:
        raise ValueError(f"{unknown[0]}: {_nearest(unknown[0].lstrip('-').split('=')[0], fields)}")

    settings = {}
    config_files = [p for p in given.positional if p.endswith(".py")]
    others = [p for p in given.positional if not p.endswith(".py")]
    for path in config_files:
        for key, value in read_config_file(path).items():
            if key not in fields:
                raise ValueError(f"{path}: {key} = {value!r}: {_nearest(key, fields)}")
            settings[key] = _checked(value, fields[key], f"{path}: {key} = {value!r}")
    if others:
        if "files" not in fields:
            raise ValueError(f"{others[0]}: not a config file (config/NAME.py) and not --key=value")
        settings["files"] = tuple(others)
    in_files = dict(settings)
    for key, text in vars(given).items():
        if key in fields and text is not None:
            settings[key] = _parsed(text, fields[key], f"--{key}={text}")
    if hasattr(cls, "complete"):            # what the command line replaces may still count
        settings = cls.complete(settings, in_files)
    return cls(**settings)


def read_config_file(path):
    """Run a config file and return the settings that it leaves behind, {name: value}."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such config file")
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise ValueError(f"{path} does not run: {type(error).__name__}: {error}") from error
    not_settings = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {k: v for k, v in names.items()
            if not k.startswith("_") and not isinstance(v, not_settings)}


def write_config_file(path, cfg):
    """Write every setting of `cfg` as a config file that gives the same `cfg` again."""
    lines = [f"{f.name} = {getattr(cfg, f.name)!r}\n" for f in dataclasses.fields(cfg)]
    Path(path).write_text("".join(lines), encoding="utf-8")


def run(main, cls, doc):
    """Run a script: `main(configure(cls, arguments))`, and one sentence for a mistake of its user.

    An error that our own files raise on purpose is the sentence; all else keeps its traceback.
    """
    script = Path(sys.argv[0]).name
    # a line reaches a pipe when it is written, and a console that lacks a letter gets a "?"
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        main(configure(cls, sys.argv[1:], doc))
    except (ValueError, OSError, ImportError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if raised_in.parent != HERE:
            raise
        sys.exit(f"{script}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\n{script}: stopped")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}. `python {self.prog} --help` lists the settings")


def _parser(cls, fields, doc):
    script = Path(sys.argv[0]).name
    parser = _Parser(prog=script, usage=f"python {script} [config/NAME.py] [--key=value ...]",
                     description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("positional", nargs="*", help=argparse.SUPPRESS)
    table = parser.add_argument_group("settings")
    comments = _comments(cls)
    for f in fields.values():
        if f.name != "files":
            shown = f"{comments.get(f.name, '')} ({_kind(f).__name__}, {f.default!r})".strip()
            table.add_argument(f"--{f.name}", metavar="", help=shown.replace("%", "%%"))
    return parser


def _comments(cls):
    """{field: the comment on its line}, from the source of `cls` and the classes it extends."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    (\w+): \w+(?: \| None)? = .*?  # (.*)", line):
                found[match[1]] = match[2]
    return found


def _spell_out(arg, fields):
    """--flag means --flag=True for a setting that is a bool."""
    name = arg[2:] if arg.startswith("--") else ""
    return f"{arg}=True" if name in fields and _kind(fields[name]) is bool else arg


def _kind(field):
    """int, float, bool or str, where the type of `field` may be that or None."""
    return next((k for k in typing.get_args(field.type) if k is not types.NoneType), field.type)


def _may_be_none(field):
    return types.NoneType in typing.get_args(field.type)


def _nearest(key, fields):
    close = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else "; --help lists them"
    return f"no setting is called {key}{hint}"


def _parsed(text, field, shown):
    """The value that `text` from the command line means for `field`."""
    kind = _kind(field)
    if text == "None" and _may_be_none(field):
        return None
    if kind is str:
        return text
    if kind is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise ValueError(f"{shown}: {field.name} is True or False")
        return words[text.lower()]
    try:
        number = float(text) if kind is float or not re.fullmatch(r"[+-]?[\d_]+", text) \
            else int(text)
    except ValueError:
        raise ValueError(f"{shown}: {field.name} is a number ({kind.__name__})") from None
    return _checked(number, field, shown)


def _checked(value, field, shown):
    """`value` as the type of `field`: an int may stand for a float, 1e5 for an int, no more."""
    kind = _kind(field)
    if type(value) is kind or value is None and _may_be_none(field):
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    raise ValueError(f"{shown}: {field.name} is of type {kind.__name__}, "
                     f"not {type(value).__name__}")
