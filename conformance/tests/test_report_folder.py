"""The folder of a report: tried before the run, the verdict kept when writing fails, the last run's files removed."""

import errno
import hashlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rattention.conformance import backends, runner, tensorfile
from rattention.conformance.cli import app
from rattention.conformance.reporting.folder import LEDGER, Folder
from rattention.numpy.adapter import backend as honest
from typer.testing import CliRunner

WHERE = ("rep", "deep/er/rep", "with space/rep", "[red]no markup[/]")


class Wrong:
    describe = honest.describe

    def run(self, op, tensors, attrs):
        return {name: x + 1 for name, x in honest.run(op, tensors, attrs).items()}


@pytest.fixture(scope="module")
def outcomes():
    """One failing and one conforming run, in this process."""
    settings = runner.Settings("smoke", 1, select="FM-2")
    return {name: runner.conform(name, settings, backend=port) for name, port in (("bad", Wrong()), ("good", honest))}


@pytest.fixture
def ran(monkeypatch, outcomes, tmp_path):
    """The command line in an empty folder, with these runs in place of its own; the names of those that began."""
    began = []

    def conform(target, settings, progress=None):
        began.append(target)
        return outcomes[target]

    monkeypatch.setattr(runner, "conform", conform)
    monkeypatch.setattr("rattention.conformance.cli.default_vectors", lambda profile: [])
    monkeypatch.chdir(tmp_path)
    return began


def call(*arguments):
    """Exit code, stdout, stderr."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def tree(folder="."):
    return sorted(str(p) for p in Path(folder).rglob("*"))


def cases(folder):
    return sorted(Path(folder).glob("cases/*"))


# ---------------------------------------------------------------------------------------------- found out before


def _spoil(kind: str) -> str:
    Path("file").write_text("")
    Path("rep").mkdir()
    if kind == "a folder of that name":
        Path("rep/report.json").mkdir()
    elif kind == "a file for the cases":
        Path("rep/cases").write_text("")
    elif kind == "dangling link":
        Path("link").symlink_to("nowhere")
    return {"file": "file", "through a file": "file/x/y", "kernel": "/proc/x", "dangling link": "link"}.get(kind, "rep")


KINDS = ("file", "through a file", "kernel", "dangling link", "a folder of that name", "a file for the cases")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_written_is_refused_before_the_run(ran, kind):
    if kind == "kernel" and not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    report = _spoil(kind)
    before = tree()
    code, out, err = call("conform", "good", "--profile", "smoke", "--report", report)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert report in err
    assert "CONFORMING" not in out
    assert not ran
    assert tree() == before


@pytest.mark.parametrize(
    "command", [("vectors", "export", "file/x"), ("mutants", "--select", "window-looks-ahead", "--report", "file/x")]
)
def test_every_command_that_writes_refuses_it(ran, command):
    Path("file").write_text("")
    code, _, err = call(*command)
    assert code == 2
    assert "file is not a folder" in err
    assert len(err.splitlines()) == 1


def test_a_full_disk_is_found_out_before_the_run(ran, monkeypatch):
    monkeypatch.setattr("rattention.conformance.reporting.folder.TRIAL", 2**20)
    full = _no_space(monkeypatch)
    code, _, err = call("conform", "good", "--profile", "smoke", "--report", full)
    assert code == 2
    assert not ran
    assert "cannot be written" in err
    assert not Path(full).exists()


def _no_space(monkeypatch) -> str:
    """A folder in which a trial file meets a full disk."""
    import tempfile

    real = tempfile.NamedTemporaryFile

    def full(*args, **settings):
        file = real(*args, **settings)
        file.flush = lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        return file

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    return "rep"


# ---------------------------------------------------------------------------------------------- found out at the end


@pytest.mark.parametrize(("target", "code", "verdict"), [("bad", 1, "NOT CONFORMING"), ("good", 0, "CONFORMING")])
@pytest.mark.parametrize("name", ["report.json", "report.html", LEDGER])
def test_the_verdict_stays_when_writing_fails(ran, monkeypatch, target, code, verdict, name):
    _fails_at(monkeypatch, name)
    found, out, err = call("conform", target, "--profile", "smoke", "--report", "rep")
    assert found == code
    assert verdict in out
    assert "report: rep" not in out
    assert "rattention replay" not in out  # the cases come last, and are not there
    assert err.splitlines() == [f"rattention: rep/{name} could not be written: No space left on device"]


def _fails_at(monkeypatch, name: str) -> None:
    real = tensorfile.write_bytes

    def write(path, data):
        if name in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(tensorfile, "write_bytes", write)


def test_only_cases_that_were_written_have_a_replay_line(ran, outcomes, monkeypatch):
    lost = sorted(f.index for f in outcomes["bad"].failures)[1]
    _fails_at(monkeypatch, f"-{lost}.safetensors")
    code, out, _ = call("conform", "bad", "--profile", "smoke", "--report", "rep")
    assert code == 1
    lines = [line for line in out.splitlines() if line.startswith("rattention replay")]
    assert len(lines) == len(cases("rep")) == 1


@pytest.mark.parametrize(("target", "code"), [("bad", 1), ("good", 0)])
def test_a_working_folder_that_cannot_be_written_costs_no_verdict(ran, monkeypatch, target, code):
    if not Path("/proc/self").exists():
        pytest.skip("this system has no /proc, a folder in which nobody can write")
    monkeypatch.chdir("/proc")
    found, out, err = call("conform", target, "--profile", "smoke")
    assert found == code
    assert "CONFORMING" in out
    assert ("times the budget" in out, len(err.splitlines())) == ((True, 1) if code else (False, 0))


def test_the_report_lies_where_the_run_began(ran, monkeypatch, outcomes, tmp_path):
    (tmp_path / "elsewhere").mkdir()

    def conform(target, settings, progress=None):
        os.chdir(tmp_path / "elsewhere")  # a port may do so when it is imported
        return outcomes[target]

    monkeypatch.setattr(runner, "conform", conform)
    assert call("conform", "bad", "--profile", "smoke", "--report", "rep")[0] == 1
    assert (tmp_path / "rep" / "report.json").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())


# ---------------------------------------------------------------------------------------------- the last run's files


@pytest.mark.parametrize("report", WHERE)
def test_a_conforming_run_leaves_no_case_of_the_last(ran, report):
    assert call("conform", "bad", "--profile", "smoke", "--report", report)[0] == 1
    assert len(cases(report)) > 1
    assert call("conform", "good", "--profile", "smoke", "--report", report)[0] == 0
    assert not (Path(report) / "cases").exists()
    assert json.loads((Path(report) / "report.json").read_text())["conforming"]


def test_without_report_the_folder_goes_with_its_cases(ran):
    assert call("conform", "bad", "--profile", "smoke")[0] == 1
    assert list(Path("rattention-failures").glob("*.safetensors"))
    assert call("conform", "good", "--profile", "smoke")[0] == 0
    assert tree() == []


def test_what_somebody_put_there_or_changed_stays(ran):
    call("conform", "bad", "--profile", "smoke", "--report", "rep")
    first, second, *_ = cases("rep")
    kept = Path("rep/cases/kept.safetensors")
    kept.write_bytes(first.read_bytes())
    Path("rep/notes.txt").write_text("mine")
    first.write_bytes(first.read_bytes() + b"changed")
    call("conform", "good", "--profile", "smoke", "--report", "rep")
    assert cases("rep") == sorted([first, kept])
    assert Path("rep/notes.txt").read_text() == "mine"
    assert not second.exists()


def test_a_folder_without_a_list_of_ours_is_left_alone(ran):
    for name, text in (("rattention-failures/mine.safetensors", "x"), (f"rattention-failures/{LEDGER}", "no list")):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    before = tree()
    call("conform", "good", "--profile", "smoke")
    assert tree() == before


@pytest.mark.parametrize("name", ["../outside", "/outside", "link/inside"])
def test_a_list_cannot_name_files_outside(tmp_path, name):
    data = b"somebody's"
    (tmp_path / "other").mkdir()
    for file in ("outside", "other/inside"):
        (tmp_path / file).write_bytes(data)
    rep = tmp_path / "rep"
    rep.mkdir()
    (rep / "link").symlink_to(tmp_path / "other")
    listed = str(tmp_path / "outside") if name.startswith("/") else name
    (rep / LEDGER).write_text(json.dumps({"files": {listed: hashlib.sha256(data).hexdigest()}}))
    Folder(rep).write({})
    assert (tmp_path / "outside").is_file()
    assert (tmp_path / "other" / "inside").is_file()


def test_the_cases_that_a_run_reads_stay(ran, outcomes, monkeypatch):
    call("conform", "bad", "--profile", "smoke", "--report", "rep")
    before = cases("rep")
    assert call("conform", "good", "--profile", "smoke", "--report", "rep", "--vectors", "rep/cases")[0] == 0
    assert cases("rep") == before
    assert call("conform", "good", "--profile", "smoke", "--report", "rep")[0] == 0
    assert not Path("rep/cases").exists()


def test_two_runs_at_once_leave_no_file_that_the_next_does_not_know(tmp_path):
    one, other = Folder(tmp_path / "rep"), Folder(tmp_path / "rep")
    one.write({"a/1": b"1"})
    other.write({"b/2": b"2"})
    one.write({"a/3": b"3"})
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("[0-9]"))] == ["rep/a/3", "rep/b/2"]
    Folder(tmp_path / "rep").write({})
    assert not (tmp_path / "rep").exists()


def test_a_second_run_into_the_folder_is_refused_before_it_begins(ran):
    first = Folder("rep")
    assert first.claim()
    code, _, err = call("conform", "good", "--profile", "smoke", "--report", "rep")
    assert code == 2
    assert err == "rattention: --report rep: another run of rattention is writing there\n"
    assert not ran
    first.release()
    assert tree() == []
    assert call("conform", "good", "--profile", "smoke", "--report", "rep")[0] == 0


def test_without_report_a_second_run_has_a_folder_of_its_own(ran):
    first = Folder("rattention-failures")
    assert first.claim()
    first.write({"theirs.safetensors": b"of the first"})
    code, out, _ = call("conform", "bad", "--profile", "smoke")
    assert code == 1
    assert Path("rattention-failures/theirs.safetensors").is_file()
    assert "rattention replay rattention-failures-2/" in out
    first.release()
    assert call("conform", "good", "--profile", "smoke")[0] == 0
    assert not Path("rattention-failures").exists()
    assert list(Path("rattention-failures-2").glob("*.safetensors"))  # it is nobody's any more, and has its failures


def test_a_claim_is_given_up_by_a_run_that_was_killed(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from rattention.conformance.reporting.folder import Folder\n"
        "assert Folder(sys.argv[1]).claim()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "rep")], check=False).returncode != 0
    folder = Folder(tmp_path / "rep")
    assert folder.claim()
    folder.release()


def test_a_run_that_writes_nothing_leaves_no_folder(ran, monkeypatch):
    def gone(*_, **__):
        raise backends.CannotRun("gone")

    monkeypatch.setattr(runner, "conform", gone)
    for arguments in ((), ("--report", "deep/er/rep")):
        assert call("conform", "good", "--profile", "smoke", *arguments)[0] == 2
        assert tree() == []


# ---------------------------------------------------------------------------------------------- several backends


@pytest.fixture
def both(monkeypatch):
    def names(*chosen):
        monkeypatch.setattr(backends, "runnable", lambda: (list(chosen), {}))
        monkeypatch.setattr(backends, "cost", lambda name: "direct")

    return names


def test_all_and_one_do_not_mix(ran, both):
    both("bad", "good")
    assert call("conform", "all", "--profile", "smoke", "--report", "rep")[0] == 1
    assert len(cases("rep/bad")) > 1
    assert Path("rep/good/report.html").is_file()
    assert call("conform", "good", "--profile", "smoke", "--report", "rep")[0] == 0
    assert tree("rep") == sorted(f"rep/{n}" for n in (LEDGER, "junit.xml", "report.html", "report.json"))
    assert call("conform", "all", "--profile", "smoke", "--report", "rep")[0] == 1
    assert not Path("rep/junit.xml").exists()


def test_names_that_are_no_folders_get_one_each(ran, both, outcomes, monkeypatch):
    names = ["../up", "a/b", "a-b", "report.json", "/"]
    both(*names)
    several = {name: replace(outcomes["good"], backend=name) for name in names}
    monkeypatch.setattr(runner, "conform", lambda target, settings, progress=None: several[target])
    assert call("conform", "all", "--profile", "smoke", "--report", "rep")[0] == 0
    assert len(list(Path("rep").glob("*/report.json"))) == len(names)
    assert tree() == ["rep", *tree("rep")]


def test_one_backend_that_does_not_start_costs_the_others_no_verdict(ran, both, monkeypatch, outcomes):
    real = runner.conform

    def conform(target, settings, progress=None):
        if target == "gone":
            raise backends.CannotRun("gone does not start in a worker process")
        return real(target, settings, progress=progress)

    monkeypatch.setattr(runner, "conform", conform)
    for others, code in ((("good",), 2), (("good", "bad"), 1)):
        both("gone", *others)
        found, out, _ = call("conform", "all", "--profile", "smoke", "--report", "rep")
        assert found == code
        assert "gone does not start" in out
        assert "conforming" in out
        assert "gone" in json.loads(Path("rep/report.json").read_text())["absent"]


def test_replay_lines_are_quoted_for_a_shell(ran, outcomes):
    code, out, _ = call("conform", "bad", "--profile", "smoke", "--report", "with space/rep")
    assert code == 1
    line = next(line for line in out.splitlines() if line.startswith("rattention replay"))
    _, _, file, _ = shlex.split(line)
    assert Path(file).is_file()
    page = Path("with space/rep/report.html").read_text()
    assert "rattention replay cases/" in page


# ---------------------------------------------------------------------------------------------- other commands


@pytest.fixture
def few(monkeypatch):
    """Four cases in an export with seed 0, three with seed 1."""
    from rattention.conformance.properties import REGISTRY
    from rattention.conformance.strategies import make_plan

    def recipes(plan):
        drawn = [r for r in REAL.draw(make_plan("smoke", 0, {"name": "export"})) if r.op == "feature_map"]
        return iter(drawn[plan.seed : 4])

    REAL = REGISTRY["agreement"]
    monkeypatch.setitem(REGISTRY, "agreement", replace(REAL, draw=recipes))


def test_an_export_replaces_the_last_and_no_other_set(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("vectors", "export", "set", "--seed", "0")[0] == 0
    assert len(list(Path("set").glob("*.safetensors"))) == 4
    assert call("vectors", "export", "set", "--seed", "1")[0] == 0
    assert len(list(Path("set").glob("*.safetensors"))) == 3
    manifest = Path("set/manifest.json")
    manifest.write_text(manifest.read_text().replace("generated", "my own"))
    before = manifest.read_text()
    code, _, err = call("vectors", "export", "set")
    assert code == 2
    assert "manifest.json" in err
    assert manifest.read_text() == before


def test_an_export_that_cannot_be_written_in_full_is_no_export(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _fails_at(monkeypatch, "manifest.json")
    code, _, err = call("vectors", "export", "set")
    assert code == 2
    assert err.splitlines() == ["rattention: set/manifest.json could not be written: No space left on device"]


def test_a_part_of_the_mutants_leaves_no_table_of_the_whole(tmp_path):
    (tmp_path / "coverage.md").write_text("| SWA-1 | of an earlier run |")
    assert call("mutants", "--profile", "smoke", "--select", "window-looks-ahead", "--report", tmp_path)[0] == 0
    assert "SWA-1" not in (tmp_path / "coverage.md").read_text()
    assert json.loads((tmp_path / "mutants.json").read_text())["mutants"]
