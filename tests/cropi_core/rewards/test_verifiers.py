"""Properties of grading: a hostile item affects only itself; what cannot be graded is never counted as wrong."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cropi_core.errors import ConfigError
from cropi_core.rewards import worker as verifier_worker
from cropi_core.rewards.cache import SHARED
from cropi_core.rewards.functions import source_digest
from cropi_core.rewards.verifier import MAX_COMPLETION, VERIFIERS, Grade, Verifier
from tests.support.paths import CHECKOUT
from tests.support.verifiers import gone

needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; the death signal is Linux's")


@pytest.fixture(autouse=True)
def found_by_the_verifier(monkeypatch):
    """Put the tests on the path of verifiers' processes, which is built and not inherited from this process."""
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))


@pytest.fixture(autouse=True)
def _nothing_is_known_yet():
    SHARED._rewards.clear()


HOARD: list[bytearray] = []


def spin(completion: str, answer: str) -> float:
    while True:
        pass


def doze(completion: str, answer: str) -> float:
    time.sleep(1000)
    return 1.0


def c_loop(completion: str, answer: str) -> float:
    return float(9 ** (9**9))  # one C call of minutes that never releases the GIL


def raises(completion: str, answer: str) -> float:
    raise ValueError("no such thing")


def exits(completion: str, answer: str) -> float:
    sys.exit(3)


def leaves(completion: str, answer: str) -> float:
    os._exit(7)


def shoots_itself(completion: str, answer: str) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def eats_memory(completion: str, answer: str) -> float:
    blocks = []
    while True:
        blocks.append(bytearray(1 << 24))


def hoards(completion: str, answer: str) -> float:
    HOARD.append(bytearray(300 << 20))
    return 1.0


def needs_room(completion: str, answer: str) -> float:
    return float(len(bytearray(300 << 20)) > 0)


def prints(completion: str, answer: str) -> float:
    print('[1.0, "forged", false]', flush=True)
    os.write(1, b"more noise\n")
    return float(sys.stdin.read() == "")


def forges(completion: str, answer: str) -> float:
    for descriptor in range(3, 30):
        with contextlib.suppress(OSError):
            os.write(descriptor, b'[1.0, "", false, 0]\n' * 2)
    return 1.0


def starts_a_program(completion: str, answer: str) -> float:
    """Start one in a session of its own, without this process's environment."""
    subprocess.Popen(["sleep", answer], start_new_session=True, env={})
    if completion == "crash":
        os._exit(7)
    return 1.0


def odd(completion: str, answer: str) -> object:
    return {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "x", "0.3": 0.3, "true": True}[
        completion
    ]


NOT_CALLABLE = 3
FUNCTIONS = {
    function.__name__: f"{__name__}:{function.__name__}"
    for function in (
        *(
            spin,
            doze,
            c_loop,
            raises,
            exits,
            leaves,
            shoots_itself,
            eats_memory,
            hoards,
            needs_room,
            prints,
            forges,
            starts_a_program,
            odd,
        ),
    )
}
HOSTILE = [
    ("spin", "timed out after 1 s"),
    ("doze", "timed out after 1 s"),
    ("c_loop", "timed out after 1 s"),
    ("raises", "ValueError: no such thing"),
    ("exits", "SystemExit: 3"),
    ("leaves", "crashed (exit code 7)"),
    ("shoots_itself", "crashed (signal 9)"),
    ("forges", "the verifier wrote into the worker's replies"),
    ("eats_memory", "MemoryError"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reason"), HOSTILE)
def test_a_hostile_item_affects_only_itself(name: str, reason: str):
    items = [("exact", str(i), str(i // 2 * 2)) for i in range(200)]
    for i in (0, 77, 78, 199):
        items[i] = (name, f"18 of {i}", "18")
    timeout = 1.0 if reason.startswith("timed out") else 60.0
    with Verifier(timeout=timeout, memory_mb=192, functions=FUNCTIONS) as verifier:
        grades = verifier.grade_many(items)
        assert verifier.grade("exact", " a ", "a") == Grade(1.0, "")
    for i, grade in enumerate(grades):
        expected = Grade(None, reason) if items[i][0] == name else Grade(float(i % 2 == 0), "")
        assert grade == expected, i


@linux
@pytest.mark.parametrize("how", ["crash", "close"])
def test_no_program_that_a_function_starts_outlives_it(how: str):
    seconds = f"600.{os.getpid()}"
    with Verifier(functions=FUNCTIONS) as verifier:
        verifier.grade("starts_a_program", how, seconds)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.exists()]
    assert not [one for one in commands if seconds.encode() in one]


def test_memory_kept_by_an_earlier_item_does_not_count_for_the_next():
    with Verifier(memory_mb=512, functions=FUNCTIONS) as verifier:
        grades = verifier.grade_many([("hoards", "", ""), ("needs_room", "", ""), ("exact", "a", "a")])
    assert [grade.reward for grade in grades] == [1.0, 1.0, 1.0]


def test_what_a_verifier_prints_and_reads_does_not_reach_the_protocol():
    with Verifier(functions=FUNCTIONS) as verifier:
        grades = verifier.grade_many([("prints", "", ""), ("exact", "a", "b"), ("prints", "", "")])
    assert grades == [Grade(1.0, ""), Grade(0.0, ""), Grade(1.0, "")]


def test_only_finite_numbers_are_rewards():
    with Verifier(functions=FUNCTIONS) as verifier:
        grades = verifier.grade_many(
            [("odd", text, "") for text in ("nan", "inf", "none", "text", "0.3", "true")]
        )
    assert [grade.reward for grade in grades] == [None, None, None, None, 0.3, 1.0]
    assert [grade.reason for grade in grades[:4]] == [
        "returned nan, not finite",
        "returned inf, not finite",
        "returned NoneType, not a number",
        "returned str, not a number",
    ]


@pytest.mark.slow
@linux
@pytest.mark.parametrize("name", ["spin", "doze", "c_loop", "idle"])
def test_the_worker_dies_with_a_killed_parent(name: str, tmp_path: Path):
    pid_file = tmp_path / "pid"
    script = f"""
import time
from pathlib import Path
from cropi_core.rewards.verifier import Verifier
verifier = Verifier(timeout=300, functions={{"hostile": "{__name__}:{"raises" if name == "idle" else name}"}})
verifier.grade("exact", "a", "a")
Path({str(pid_file)!r}).write_text(str(verifier.functions._worker.process.pid))
verifier.grade("hostile", "", "")
time.sleep(300)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        end = time.monotonic() + 500
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        pid = int(pid_file.read_text())
        time.sleep(0.5)
        os.kill(pid, 0)
    finally:
        parent.kill()
        parent.wait()
    assert gone(pid)


def test_a_hanging_worker_ends_by_its_own_alarm_and_an_idle_one_by_the_end_of_its_stdin():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)}
    path = FUNCTIONS["c_loop"]
    config = {
        "memory_mb": 512,
        "alarm": 0.5,
        "imported": [],
        "functions": {"c_loop": [path, source_digest(path)]},
        "limits": {},
    }
    for request, status in (('["c_loop", "", ""]\n', -signal.SIGALRM), ("", 0)):
        worker = subprocess.Popen(
            [sys.executable, "-m", "cropi_core.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert worker.stdin
        assert worker.stdout
        worker.stdin.write(f"{json.dumps(config)}\n{request}".encode())
        worker.stdin.flush()
        if not request:
            worker.stdin.close()
        assert worker.wait(500) == status
        worker.stdin.close()
        worker.stdout.close()


def test_a_worker_whose_parent_ended_before_its_first_reply_says_nothing():
    worker = subprocess.Popen(
        [sys.executable, "-m", "cropi_core.rewards.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert worker.stdin
    assert worker.stdout
    assert worker.stderr
    worker.stdout.close()
    config = {"memory_mb": 512, "alarm": 0.5, "imported": [], "functions": {}, "limits": {}}
    worker.stdin.write(f"{json.dumps(config)}\n".encode())
    worker.stdin.close()
    with worker.stderr:
        assert worker.stderr.read() == b""
    assert worker.wait(500) == 1


def test_a_worker_outlives_the_thread_that_started_it_or_is_replaced_unseen():
    verifier = Verifier()
    thread = threading.Thread(target=lambda: verifier.grade("exact", "a", "a"))
    thread.start()
    thread.join()
    assert verifier.grade_many([("exact", f"a{i}", f"a{i}") for i in range(100)]) == [Grade(1.0, "")] * 100
    verifier.close()


@linux
def test_close_leaves_no_process_and_the_verifier_can_be_used_again():
    verifier = Verifier()
    for text in ("a", "b"):
        assert verifier.grade("exact", text, text).reward == 1.0
        assert verifier.process._worker
        pid = verifier.process._worker.process.pid
        verifier.close()
        assert not Path(f"/proc/{pid}").exists()
    verifier.close()


def test_threads_share_a_verifier():
    results: dict[int, list[Grade]] = {}
    with Verifier() as verifier:

        def work(k: int) -> None:
            results[k] = verifier.grade_many([("exact", str(i), str(k)) for i in range(100)])

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for k, grades in results.items():
        assert [grade.reward for grade in grades] == [float(i == k) for i in range(100)]
    assert len(results) == 4


def test_wrong_configuration_is_refused_before_any_grading(monkeypatch: pytest.MonkeyPatch):
    with (
        pytest.raises(ConfigError, match=r"'nope'; choose from exact, numeric, math, choice"),
        Verifier() as verifier,
    ):
        verifier.grade_many([("exact", "a", "a"), ("nope", "a", "a")])
    cases = {
        "no_such_module:f": "no module 'no_such_module'",
        "json.no_such_module:f": "no module 'json.no_such_module'",
        "no/such/file.py:f": "No such file",
        "sys:exit": "no Python source",
        f"{__name__}:no_such": "AttributeError",
        f"{__name__}:NOT_CALLABLE": "not callable",
        "math_without_colon": "names no function",
    }
    for path, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            Verifier(functions={"mine": path})
    with pytest.raises(ConfigError, match="built-in"):
        Verifier(functions={"exact": FUNCTIONS["odd"]})
    for limits in ({"timeout": 0.0}, {"timeout": float("nan")}, {"memory_mb": 0}):
        with pytest.raises(ConfigError, match="must be positive"):
            Verifier(**limits)
    with pytest.raises(ConfigError, match="memory_mb=1"):
        Verifier(memory_mb=1, functions=FUNCTIONS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "cropi\[math\]"'), Verifier() as verifier:
        verifier.grade_many([("exact", "a", "a"), ("math", "1", "1")])


def test_the_worker_is_light():
    code = "import sys, cropi_core.rewards.worker; print([m for m in ('torch', 'sympy') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
    assert verifier_worker.PARENT_DIED == signal.SIGUSR2


def test_long_completions_keep_their_end_and_exact_sees_everything():
    junk = "7 " * 200_000
    with Verifier() as verifier:
        assert verifier.grade("numeric", junk + "so 18", "18").reward == 1.0
        assert verifier.grade("numeric", "18" + " x" * MAX_COMPLETION, "18").reward == 0.0
        assert verifier.grade("exact", "x" + " " * MAX_COMPLETION + "18", "18").reward == 0.0
        assert verifier.grade("exact", junk, junk).reward == 1.0
        assert verifier.grade("exact", "\ud800 é \n\x00", "\ud800 é \n\x00").reward == 1.0


NUMERIC = [
    ("so 3 + 15 = 18.", "18", 1.0),
    ("It costs $1,234.50.", "1234.5", 1.0),
    ("it is -$5", "-5", 1.0),
    ("it is \\$-5", "−5", 1.0),
    ("5-3", "3", 0.0),
    ("5-3", "-3", 0.0),
    ("50%", "50", 1.0),
    ("3/4 of it", "0.75", 1.0),
    ("\\frac{3}{4}", "3/4", 1.0),
    ("1e3", "1000", 1.0),
    ("100m2", "100", 1.0),
    ("#### 18", "He has 9 + 9 left.\n#### 18", 1.0),
    ("18.0", "$18.00", 1.0),
    ("0.333", "1/3", 0.0),
    ("18 or rather 17", "18", 0.0),
    ("I do not know", "18", 0.0),
    ("", "18", 0.0),
    ("1/0", "18", 0.0),
    ("1" * 10_000, "18", 0.0),
    ("1e999999999", "18", 0.0),
    ("18", "eighteen", None),
    ("18", "", None),
    ("18", "18 or 19", None),
]

MATH = [
    ("#### 18", "18", 1.0),
    ("She sells 9 for 2 each.\n#### $18", "18", 1.0),
    ("The answer is \\boxed{18}", "18", 1.0),
    ("18.0", "18", 1.0),
    ("$18", "18", 1.0),
    ("\\boxed{17}, no: \\boxed{18}", "18", 1.0),
    ("\\boxed{18}, no: \\boxed{17}", "18", 0.0),
    ("\\boxed{18} and then \\boxed{", "18", 1.0),
    ("\\boxed{1,234}", "1234", 1.0),
    ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", 1.0),
    ("\\boxed{2x+2}", "2(x+1)", 1.0),
    ("\\boxed{2}", "2(x+1)", 0.0),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
    ("so $\\frac{1}{2}$", "$\\frac{2}{4}$", 1.0),
    ("\\boxed{\\text{Friday}}", "\\text{Friday}", 1.0),
    ("\\boxed{18}", "He has\n#### 18", 1.0),
    ("18", "\\boxed{18}", 1.0),
    ("I do not know", "18", 0.0),
    ("", "18", 0.0),
    ("\\boxed{\\frac{}", "18", 0.0),
    ("\\boxed{}", "18", 0.0),
    ("18", "", None),
    ("18", "???", None),
    ("18", "\\frac{", None),
]


@pytest.mark.parametrize(
    ("verifier", "cases"), [("numeric", NUMERIC), pytest.param("math", MATH, marks=needs_math)]
)
def test_examples(verifier: str, cases: list[tuple[str, str, float | None]]):
    with Verifier(timeout=20) as worker:
        grades = worker.grade_many([(verifier, completion, answer) for completion, answer, _ in cases])
    for grade, case in zip(grades, cases, strict=True):
        assert grade.reward == case[2], (case, grade)
        assert (grade.reason != "") == (grade.reward is None)


@pytest.mark.slow
@needs_math
def test_sympy_bombs_are_not_gradable_and_their_neighbours_are():
    bombs = ["9**9**9**9", "\\boxed{9^{9^{9^{9}}}}", "$9^{9^{9^9}}$"]
    items = [("math", "\\boxed{1}", "1")]
    for i, bomb in enumerate(bombs, 2):
        items += [("math", bomb, "18"), ("math", f"\\boxed{{{i}}}", f"{i}")]
    with Verifier(timeout=1.0, memory_mb=400) as verifier:
        grades = verifier.grade_many(items)
    assert [grade.reward for grade in grades] == [1.0, None, 1.0, None, 1.0, None, 1.0]


def test_a_swallowed_memory_error_surfaces():
    def swallow() -> bool:
        try:
            return bool(bytearray(1 << 60))
        except Exception:
            return False

    with pytest.raises(MemoryError), verifier_worker._memory_errors_surface():
        swallow()
    with verifier_worker._memory_errors_surface():
        assert sum(range(3)) == 3
    assert sys.gettrace() is None or "coverage" in sys.modules


def test_every_documented_verifier_exists():
    with Verifier() as verifier:
        for name in VERIFIERS:
            if name == "reasoning_gym":  # see tests/cropi_core/prompts/test_gym.py
                continue
            if name != "math" or importlib.util.find_spec("math_verify"):
                assert verifier.grade(name, *{"choice": ("B", "B")}.get(name, ("18", "18"))) == Grade(1.0, "")
