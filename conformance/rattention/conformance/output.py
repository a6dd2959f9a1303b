"""The terminal as this command writes to it, and what ends a command: exit code 2 and one line on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import typer
from rattention.conformance.backends import CannotRun
from rattention.conformance.interrupts import raised
from rattention.conformance.told import told
from rattention.conformance.vectors import CaseError
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup


class Terminal(Console):
    """A console whose reader may leave, or whose file may be on a full disk: the command goes on without it.

    The verdict is then in the exit code and the report, where Python would end the run with exit code 1.
    """

    def print(self, *objects: Any, **settings: Any) -> None:
        try:
            super().print(*objects, **settings)
        except OSError as error:
            self.lost(f"stdout could not be written: {error.strerror or error}")

    def on_broken_pipe(self) -> None:
        """The reader left, as `head` does: nobody is there to be told."""
        self.lost("")

    def lost(self, note: str) -> None:
        """Write to nothing from here on; what Python still holds for stdout would fail again when it ends."""
        self.quiet = True
        silence(self.file)
        if note:
            warn(note)


def silence(stream: Any) -> None:
    """Let a stream that cannot be written lead to nothing: what it still holds would fail again when Python ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def warn(text: str) -> None:
    """One line on stderr."""
    line = " ".join(str(text).split())
    try:
        Console(stderr=True, highlight=False).print(f"rattention: {escape(line)}", soft_wrap=True)
    except OSError:
        silence(sys.stderr)


def cannot(text: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    warn(text)
    raise typer.Exit(2)


def named(text: str) -> Path:
    """A path on the command line. Python takes the empty one, as of a shell variable that is not set, for "."."""
    if not text:
        raise typer.BadParameter("the name of a folder is empty")
    return Path(text)


class Commands(TyperGroup):
    """Exit code 1 means "not conforming" and nothing else: whatever ends a command early ends it with 2."""

    def main(self, *args: Any, **settings: Any) -> Any:
        try:
            return super().main(*args, **settings)
        except OSError:  # what is wrong with the command line could not be written to stderr
            silence(sys.stderr)
            sys.exit(2)

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **settings: Any) -> Any:
        help_wanted = "--help" in args
        try:
            ctx = super().make_context(info_name, args, *rest, **settings)
        except OSError as error:
            if not help_wanted:
                raise
            _unread(error)
        ctx.meta[HELP] = help_wanted
        return ctx

    def invoke(self, ctx: Any) -> Any:
        with raised():
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (CannotRun, CaseError) as reason:
            cannot(str(reason))
        except KeyboardInterrupt:
            cannot("interrupted")
        except SystemExit as end:  # this command ends otherwise: a backend wanted to end the process
            cannot(f"a backend called for the end of the process, with status {end.code!r}")
        except Exception as error:
            if isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code"):
                raise  # the command line's own: a wrong argument, the end of a command
            if isinstance(error, OSError) and ctx.meta.get(HELP):
                _unread(error)
            with contextlib.suppress(OSError):
                traceback.print_exc()
            cannot(f"the suite itself failed: {type(error).__name__}: {told(error)}")


HELP = "rattention.help"
"""Whether --help is among the arguments, kept with the context of a command line."""


def _unread(error: OSError) -> NoReturn:
    """The help could not be written to stdout. Nothing is wrong where its reader just left, as `head` does."""
    silence(sys.stdout)
    if isinstance(error, BrokenPipeError):
        raise typer.Exit(0)
    cannot(f"stdout could not be written: {error.strerror or error}")


def any_text() -> None:
    """Let stdout and stderr show what their encoding lacks as escapes: a name must not end the run."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
