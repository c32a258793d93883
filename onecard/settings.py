"""Config files and --key=value arguments become one checked, frozen dataclass.

    @dataclass(frozen=True)
    class TrainConfig:
        batch_size: int = 12        # windows in one micro-batch

    cfg = configure(TrainConfig, ["config/small.py", "--batch_size=4"])

A config file is Python whose variables are the settings. It may import and compute. Names that
start with an underscore are not settings. The command line wins over files, and later files win
over earlier ones.
"""
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import math
import os
import re
import runpy
import sys
import types
from pathlib import Path

from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the user can correct. Scripts print it in one line, without a traceback."""


def in_range(minimum, maximum, settings, *names):
    """Raise UserError unless each of these settings is from `minimum` to `maximum`."""
    for name in names:
        value = getattr(settings, name)
        if not minimum <= value <= maximum:     # written so that nan fails, too
            raise UserError(f"{name} = {value} must be from {minimum:,} to {maximum:,}")


def one_of(settings, **choices):
    """Raise UserError unless each setting has one of its choices."""
    for name, known in choices.items():
        value = getattr(settings, name)
        if value not in known:
            raise UserError(f"{name} = {value!r}; use {' or '.join(known)}")


def import_package(name, purpose):
    """The optional package `name`, or a UserError that says how to install it."""
    try:
        return importlib.import_module(name)
    except Exception as error:          # a broken package can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise UserError(f"{purpose} needs {name}: pip install {name}") from None
        raise UserError(f"{purpose} needs {name}, which is installed, but does not work: "
                        f"{error}") from error


def configure(cls, argv, doc=""):
    """Return `cls(**settings)` from config files and --key=value arguments.

    `cls` is a dataclass whose fields are int, float, bool or str. If it has a field `files`,
    arguments that do not end in .py go there. Raises UserError.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "files"}
    from_files, from_arguments, files = {}, {}, []
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("-h", "--help"):
            print(help_text(cls, fields, doc))
            sys.exit()
        if argument.startswith("-"):
            key, equals, text = argument.removeprefix("--").partition("=")
            check_name(key, fields, argument)
            if not equals and fields[key].type is bool:     # --flag
                text = "True"
            elif not equals:                                # --key value
                text = next(arguments, None)
                if text and text.startswith("--"):          # the value was forgotten
                    text = None
            from_arguments[key] = parse(text, fields[key])
        elif argument.endswith(".py"):
            from_files |= read_settings(argument, fields)
        else:
            files.append(argument)
    settings = from_files | from_arguments
    if files and not hasattr(cls, "files"):
        raise UserError(f"{files[0]}: not a config file (config/NAME.py) and not --key=value")
    if files:
        settings["files"] = tuple(files)
    return cls(**settings)


def read_settings(path, fields):
    """The settings of a config file, checked against `fields`."""
    settings = {}
    for key, value in read_config_file(path).items():
        source = f"{path}: {key} = {value!r}"
        check_name(key, fields, source)
        settings[key] = convert(value, fields[key], source)
    return settings


def read_config_file(path):
    """Run a config file and return its variables, {name: value}."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such config file")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} does not run: {type(error).__name__}: {error}") from error
    not_settings = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {key: value for key, value in names.items()
            if not key.startswith("_") and not isinstance(value, not_settings)}


def check_name(key, fields, source):
    """Raise UserError if no setting is called `key`."""
    if key not in fields:
        close = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "--help lists them"
        raise UserError(f"{source}: no setting is called {key}; {hint}")


def parse(text, field):
    """The value of a setting from its `text` on the command line."""
    if text is None:                    # --key was the last argument
        raise UserError(f"--{field.name} needs a value, as in --{field.name}={field.default}")
    if field.type is str:
        return text
    source = f"--{field.name}={text}"
    if field.type is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise UserError(f"{source}: {field.name} is True or False")
        return words[text.lower()]
    try:
        number = parse_number(text)
    except ValueError:
        raise UserError(f"{source}: {field.name} is a number ({field.type.__name__})") from None
    return convert(number, field, source)


def parse_number(text):
    """An int if `text` is one, which a float may round, else a float."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def convert(value, field, source):
    """`value` in the type of `field`. An int may stand for a float, and 1e5 for an int."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{source}: {field.name} must be a finite number")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if field.type is float and is_number:
        return float(value)
    if field.type is int and is_number and value == int(value):
        return int(value)
    if type(value) is field.type:       # a text, or True or False
        return value
    raise UserError(f"{source}: {field.name} is of type {field.type.__name__}, "
                    f"not {type(value).__name__}")


def config_text(cfg):
    """Every setting of `cfg`, as the text of a config file that gives the same `cfg` again."""
    return "".join(f"{f.name} = {getattr(cfg, f.name)!r}\n" for f in dataclasses.fields(cfg))


class Console:
    """stdout or stderr. It ignores a print that fails, so that no print ends hours of training.

    A print fails where a terminal was closed, a pipe has lost its reader, or a disk is full.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def open_consoles(prints_results):
    """Make print() safe, also where the shell closed a stream."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:                 # it is closed. The next file that is opened would get its
            os.open(os.devnull, os.O_RDWR)      # number, and all that libraries print
    sys.stdin = sys.stdin or open(os.devnull)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        # print line by line into a pipe, and "?" for a letter that the console does not have
        stream.reconfigure(line_buffering=True, errors="replace")
        if name == "stderr" or not prints_results:
            stream = Console(stream)
        setattr(sys, name, stream)


def configure_and_run(main, cls, doc, prints_results=False):
    """Run a script. A UserError is printed in one line; a bug keeps its traceback.

    `prints_results`: the script has no other result than what it prints, and ends if it cannot.
    """
    script = Path(sys.argv[0]).name
    open_consoles(prints_results)
    try:
        main(configure(cls, sys.argv[1:], doc))
    except UserError as error:
        tqdm.write(f"{script}: {error}", file=sys.stderr)       # does not break a progress bar
        sys.exit(1)
    except OSError as error:
        if error.errno is None:         # a library made it, not the operating system
            raise
        name = error.filename or "a file"
        tqdm.write(f"{script}: cannot read or write {name}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(f"\n{script}: stopped")


def help_text(cls, fields, doc):
    """The page of --help: each setting with its comment, its type and its default."""
    lines = [f"usage: python {Path(sys.argv[0]).name} [config/NAME.py] [--key=value ...]",
             doc, "settings:"]
    comments = comments_of(cls)
    for f in fields.values():
        comment = comments.get(f.name, "")
        lines.append(f"  --{f.name:<28} {comment} ({f.type.__name__}, {f.default!r})")
    return "\n".join(lines)


def comments_of(cls):
    """{setting: the comment on its line}, from the source of `cls` and the classes it extends."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    (\w+): \w+ = .*?  # (.*)", line):
                comments[match[1]] = match[2]
    return comments
