"""The command `cropi study` as a person starts it: processes beside one another, stopped, gone on with, and faulty."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cropi_core.artifacts.store import Store
from cropi_core.runs.records import list_runs, load_run
from tests.support import processes
from tests.support.commands import INSTALLED, MARK, person, servers_of
from tests.support.decoys import decoys, imported
from tests.support.paths import CHECKOUT
from tests.support.studies import ARMS, SHORT, written


def start(study: Path | str, root: Path, *more: str, cwd: Path = CHECKOUT) -> subprocess.Popen[str]:
    return processes.start(
        [*INSTALLED, "study", str(study), "--root", str(root), *more],
        env=person(**{MARK: str(root)}, OMP_NUM_THREADS="1"),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def workers_of(root: Path) -> list[int]:
    """Processes of a study on this root."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"flows.study.worker" in words and str(root).encode() in words:
            found.append(int(path.parent.name))
    return found


def gone(root: Path, within: float = 500) -> bool:
    deadline = time.monotonic() + within
    while (workers_of(root) or servers_of(root)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not workers_of(root) and not servers_of(root)


@pytest.mark.slow
def test_a_study_one_of_whose_curricula_fails_and_the_same_study_again(tmp_path: Path):
    arms = ARMS | {
        "ratio": {"settings": {"selection.ratio": 0.3}},
        "starved": {"settings": {"selection.ratio": 0.05}},
    }
    study, root = written(tmp_path / "tiny.yaml", arms=arms), tmp_path / "root"
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study tiny -->\nold\n<!-- end of study tiny -->\nafter\n", encoding="utf-8")
    markers = decoys(tmp_path / "elsewhere")
    first = start(study, root, "--processes", "2", "--json", "--write", str(page), cwd=tmp_path / "elsewhere")
    out, err = first.communicate(timeout=500)
    assert first.returncode == 1, err
    assert not imported(markers), "modules of the working directory were imported"
    told = json.loads(out)
    assert told["curricula"] == {"planned": 4, "done": 3}
    (failed,) = told["failed"]
    assert failed["label"] == "one starved seed 0"
    assert "selected 2 prompts of 40" in failed["error"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "one starved seed 0: stage 1 selected 2 prompts of 40" in text
    assert (tmp_path / "page.png").is_file()
    assert gone(root)
    # What two arms have in common was computed once, though they ran side by side.
    store = Store(root)
    records = [load_run(store, run) for run in list_runs(store)]
    computed = [e.ref.key for r in records for e in r.slots.values() if e.origin == "computed"]
    assert len(computed) == len(set(computed))
    # Again, without the fault: nothing is run, no server is started, and the figures are the same.
    mended = written(tmp_path / "tiny.yaml", arms={k: v for k, v in arms.items() if k != "starved"})
    logs = sorted((root / ".prefect").glob("server-*.log"))
    assert logs
    out, err = (second := start(mended, root, "--json")).communicate(timeout=500)
    assert second.returncode == 0, err
    assert err == ""
    assert sorted((root / ".prefect").glob("server-*.log")) == logs
    again = json.loads(out)
    same = ("median_step_ratio", "median_cost_ratio", "worlds")
    assert {k: again[k] for k in same} == {k: told[k] for k in same}
    assert records == [load_run(store, run) for run in list_runs(store)]


@pytest.mark.extended
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_study_leaves_no_process_and_resumes(tmp_path: Path, how: signal.Signals):
    long = SHORT | {"training.steps": 400, "runtime.mode": "subprocess"}
    study, root = written(tmp_path / "long.yaml", settings=long), tmp_path / "root"
    run = start(study, root, "--processes", "2")
    deadline = time.monotonic() + 500
    while not list((root / ".work").glob("policy-*/**/*")) and time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.2)
    found = {key: Store(root).manifest(key).digest for key in Store(root).keys()}  # noqa: SIM118
    assert found
    assert len(workers_of(root)) == 2
    if how == signal.SIGINT:
        os.killpg(run.pid, how)  # what a terminal does
        _, err = run.communicate(timeout=500)
        assert run.returncode == 130
        assert err.splitlines()[-1] == "Interrupted. Run the same command again to resume."
        assert "Traceback" not in err, err
    else:
        run.kill()
        run.wait()
    assert gone(root)
    short = written(tmp_path / "long.yaml")
    out, err = (again := start(short, root, "--json")).communicate(timeout=500)
    assert again.returncode == 0, err
    assert json.loads(out)["curricula"] == {"planned": 2, "done": 2}
    store = Store(root)
    assert found.items() <= {key: store.manifest(key).digest for key in store.keys()}.items()  # noqa: SIM118


def test_a_wrong_study_starts_no_server_and_an_empty_comparison_is_reported(tmp_path: Path):
    wrong = written(tmp_path / "wrong.yaml", reference="ful")
    _, err = (run := start(wrong, tmp_path / "root")).communicate(timeout=500)
    assert run.returncode == 2
    assert "did you mean full" in err
    assert not (tmp_path / "root").exists()
    study = written(tmp_path / "tiny.yaml")
    _, err = (run := start(study, tmp_path / "root", "--arm", "crop")).communicate(timeout=500)
    assert run.returncode == 2
    assert "did you mean cropi" in err
    _, err = (run := start(study, tmp_path / "root", "--tabulate")).communicate(timeout=500)
    assert run.returncode == 2
    assert "none of its 2 curricula is finished" in err
