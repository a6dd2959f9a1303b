"""Ctrl-C at the moments when no command listens: during imports, and while a report is being written."""

import signal
import subprocess
import sys

import pytest


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["typer", "numpy", "rich.console", "rattention.conformance.cli"])
def test_ctrl_c_while_imports_run_is_one_line(module):
    # A finder that presses Ctrl-C when the module is looked for.
    code = (
        "import os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Impatient:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Impatient())\n"
        "sys.argv[1:] = ['ops']\n"
        "runpy.run_module('rattention.conformance', run_name='__main__', alter_sys=True)\n"
    )
    found = run(code)
    assert (found.returncode, found.stdout, found.stderr) == (2, "", "rattention: interrupted\n")


def test_a_ctrl_c_that_the_caller_ignores_stays_ignored():
    code = (
        "import os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sys.argv[1:] = ['--version']\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "runpy.run_module('rattention.conformance', run_name='__main__', alter_sys=True)\n"
    )
    found = run(code)
    assert found.returncode == 0
    assert found.stdout.startswith("rattention ")


def test_a_second_ctrl_c_waits_for_the_report_and_a_third_does_not():
    code = (
        "import os, signal\n"
        "from rattention.conformance import interrupts\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "interrupts.listen()\n"
        "def press(): os.kill(os.getpid(), signal.SIGINT)\n"
        "with interrupts.raised():\n"
        "    try:\n"
        "        press()\n"
        "    except KeyboardInterrupt:\n"
        "        interrupts.hold()\n"
        "    press()\n"
        "    print('written', flush=True)\n"
        "    press()\n"
        "    print('not reached', flush=True)\n"
    )
    found = run(code)
    assert (found.returncode, found.stdout) == (2, "written\n")
    first, second = found.stderr.splitlines()
    assert "writing what was found" in first
    assert second == "rattention: interrupted"


def test_a_library_keeps_ctrl_c_in_its_own_hands():
    from rattention.conformance import interrupts

    before = signal.getsignal(signal.SIGINT)
    interrupts.hold()
    with interrupts.raised():
        assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGINT) is before
