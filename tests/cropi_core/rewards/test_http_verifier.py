"""A local server that hangs, fails, lies, floods and redirects: only valid answers become rewards."""

import asyncio
import threading
import time

import pytest

from cropi_core.errors import ConfigError, ServerError
from cropi_core.rewards import http as http_verifier
from cropi_core.rewards.verifier import Grade, Item
from cropi_core.system.ports import free_port
from tests.support.judge import PROMPT, serving, verifier


@pytest.fixture
def server(monkeypatch):
    with serving(monkeypatch) as server:
        yield server


@pytest.mark.slow
def test_rewards_come_in_order_and_the_prompt_is_sent(server):
    items = [Item("judge", str(i), str(i // 2), PROMPT) for i in range(40)] + [("exact", "a", "a")]
    with verifier(server) as one:
        grades = one.grade_many(items)
        assert one.grade_many(items) == grades
    assert grades == [Grade(float(i == i // 2), "") for i in range(40)] + [Grade(1.0, "")]
    assert len(server.seen) == 40
    assert {"completion": "7", "answer": "3", "prompt": PROMPT} in [one["body"] for one in server.seen]


def test_another_prompt_is_another_question(server):
    with verifier(server) as one:
        one.grade_many([Item("judge", "1", "1", [{"role": "user", "content": text}]) for text in "xyx"])
    assert len(server.seen) == 2


FAILURES = {
    "hang": "no answer within timeout_s=1 (3 attempts)",
    "drip": "no answer within timeout_s=1 (3 attempts)",
    "flood": "answered with more than 65536 bytes",
    "redirect": "HTTP 307, a redirect; give the URL where it leads",
    "cut": "RemoteProtocolError",
    "zipped": "answered no",
    "status 500": 'HTTP 500: {"reward": 1} (3 attempts)',
    "status 404": 'HTTP 404: {"reward": 1}',
    "status 204": "HTTP 204",
    "raw <html>": 'answered no {"reward": number}: <html>',
    "raw": 'answered no {"reward": number}',
    "raw []": "answered no",
    "raw {}": "answered no",
    'raw {"reward": "1"}': "answered a reward: str, not a number",
    'raw {"reward": NaN}': "answered a reward: nan, not finite",
    'raw {"reward": 1e9}': "answered a reward: 1e+09, beyond 1e+06",
    f'raw {{"reward": 1{"0" * 400}}}': "answered a reward beyond all bounds",
    f"raw {'[' * 60_000}": "answered no",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FAILURES, ids=lambda what: what[:20])
def test_what_fails_is_not_graded_and_its_neighbours_are(server, what):
    with verifier(server) as one:
        grades = one.grade_many([("judge", "a", "a"), ("judge", what, ""), ("judge", "a", "b")])
    assert (grades[0], grades[2]) == (Grade(1.0, ""), Grade(0.0, ""))
    assert grades[1].reward is None
    assert grades[1].reason.startswith(FAILURES[what]), grades[1]
    tries = sum(one["body"]["completion"] == what for one in server.seen)
    assert tries == (3 if what in ("hang", "drip", "cut", "status 500") else 1)
    assert {one["path"] for one in server.seen} == {"/grade"}


def test_the_server_may_say_that_something_is_not_gradable(server):
    items = [
        ("judge", 'raw {"reward": null, "reason": "no  rubric"}', ""),
        ("judge", 'raw {"reward": null}', ""),
    ]
    with verifier(server) as one:
        grades = one.grade_many(items)
    assert grades == [Grade(None, "no rubric"), Grade(None, "the server gave no reward")]


def test_a_busy_server_is_retried(server):
    with verifier(server) as one:
        assert one.grade_many([("judge", f"busy {i}", "") for i in range(5)]) == [Grade(0.75, "")] * 5
    assert len(server.seen) == 15


def test_a_server_that_grades_nothing_at_all_is_an_error_and_no_reward(server):
    with verifier(server) as one:
        with pytest.raises(ServerError, match=r"judge at http://127.*graded none of 2 completions: HTTP 401"):
            one.grade_many([("judge", "status 401", ""), ("judge", "status 401 too", "")])
        assert one.grade("judge", "a", "a") == Grade(1.0, "")
    with (
        verifier(server, url=f"http://127.0.0.1:{free_port()}/") as one,
        pytest.raises(ServerError, match="ConnectError"),
    ):
        one.grade("judge", "a", "a")


def test_one_item_that_a_server_cannot_grade_is_that_items_matter_and_many_in_a_row_are_the_servers(server):
    with verifier(server) as one:
        assert one.grade("judge", "a", "a") == Grade(1.0, "")
        for i in range(http_verifier.SILENT - 1):
            assert one.grade("judge", "status 404", str(i)).reward is None
        with pytest.raises(ServerError, match="graded none of 8 completions: HTTP 404"):
            one.grade("judge", "status 404", "once more")
        assert one.grade("judge", "b", "b") == Grade(1.0, "")
        assert one.grade("judge", "status 404", "again").reward is None


def test_requests_go_side_by_side_up_to_the_limit(server):
    with verifier(server, concurrency=4) as one:
        grades = one.grade_many([("judge", "slow", str(i)) for i in range(12)])
    assert grades == [Grade(1.0, "")] * 12
    assert server.most == 4


def test_secrets_come_from_the_environment_and_are_not_shown(server, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "Bearer s3cret")
    monkeypatch.setenv("BROKEN", "s3cret\r\nX: y")
    headers = {"Authorization": "JUDGE_TOKEN"}
    with verifier(server, headers_from_env=headers) as one:
        assert one.grade("judge", "a", "a") == Grade(1.0, "")
        assert server.seen[0]["headers"]["Authorization"] == "Bearer s3cret"
        assert "s3cret" not in one.grade("judge", "status 403", "").reason
    with verifier(server, headers_from_env=headers) as one, pytest.raises(ServerError) as failed:
        one.grade("judge", "status 403", "")
    assert "s3cret" not in str(failed.value)
    with pytest.raises(ConfigError, match="characters that no HTTP header can") as refused:
        verifier(server, headers_from_env={"Authorization": "BROKEN"})
    assert "s3cret" not in str(refused.value)
    with pytest.raises(ConfigError, match="NOT_SET, which is not set"):
        verifier(server, headers_from_env={"Authorization": "NOT_SET"})


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with verifier(server) as one:
        assert one.grade("judge", "a", "a") == Grade(1.0, "")


def test_it_grades_where_an_event_loop_runs_already(server):
    async def inside():
        with verifier(server) as one:
            return one.grade("judge", "\ud800", "\ud800")

    assert asyncio.run(inside()) == Grade(1.0, "")


def test_an_interrupt_ends_the_requests_under_way(server):
    def interrupt():
        time.sleep(0.5)
        import _thread

        _thread.interrupt_main()

    threading.Thread(target=interrupt).start()
    start = time.monotonic()
    with verifier(server, timeout_s=200) as one, pytest.raises(KeyboardInterrupt):
        one.grade("judge", "hang", "")
    assert time.monotonic() - start < 100
    assert not [thread for thread in threading.enumerate() if thread.name == "cropi-http-verifier"]
