"""Errors that a user can act on: one line, with the place and the remedy.

The command line prints them as ``error: <message>`` and exits with code 2 (``--debug`` shows the
traceback). The message reads ``<file>[:<member, path or line>]: <what, with the value> (<what to do>)``.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class MhmoeError(Exception):
    """Base of every error that the command line shows as a single line."""


class ConfigError(MhmoeError, ValueError):
    """A configuration value is unknown, impossible, or does not fit another one."""


class DataError(MhmoeError):
    """A data file is missing, damaged, or not in the expected format."""


class CheckpointError(MhmoeError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class TrainingError(MhmoeError):
    """Training cannot go on: too many bad samples or steps without a finite gradient."""


def one_line(text: object, limit: int = 300) -> str:
    """``text`` on a single line, control characters shown escaped, cut at ``limit`` characters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def describe_os_error(error: OSError) -> str:
    """What the operating system refused, with the file where it names one."""
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{error.strerror or error} (look at the disk's space and the file's permissions)"


class OneLineParser(argparse.ArgumentParser):
    """An ``ArgumentParser``, and parent of such subparsers, whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        hint = " (see --help)"
        self.exit(2, one_line(f"error: {message}", 300 - len(hint)) + hint + "\n")


def guard(action: Callable[[], int], *, debug: bool = False) -> int:
    """The exit code of ``action``; an error of ours, or of files and disks, becomes one line on stderr and exit code
    2, Ctrl-C becomes 130.

    Args:
        action: what a command does.
        debug: let the error through, to show its traceback.
    """
    try:
        return action()
    except MhmoeError as error:
        if debug:
            raise
        print(one_line(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        if debug or error.errno is None:
            raise
        print(one_line(f"error: {describe_os_error(error)}"), file=sys.stderr)
        return 2
