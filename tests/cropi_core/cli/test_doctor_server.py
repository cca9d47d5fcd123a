"""`cropi doctor` asks the Prefect server that the environment names whether it takes the password."""

import pytest

from cropi_core.cli.doctor import prefect_server
from tests.support.guarded import PASSWORD, guarded_server


@pytest.fixture(scope="module")
def server():
    with guarded_server() as url:
        yield url


@pytest.mark.parametrize(
    ("password", "path", "state", "words"),
    [
        (PASSWORD, "/api", "ok", "Prefect 3.8.8"),
        (PASSWORD, "/api/", "ok", "Prefect 3.8.8"),
        ("team:wrong", "/api", "broken", "refuses the password (401)"),
        ("pässword", "/api", "broken", "refuses the password (401)"),
        (None, "/api", "broken", "refuses access without a password (401)"),
        (PASSWORD, "", "broken", "is not a Prefect API"),
    ],
)
def test_a_server_is_queried_with_the_password(server, monkeypatch, password, path, state, words):
    monkeypatch.delenv("PREFECT_API_KEY", raising=False)
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    if password is not None:
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", password)
    check = prefect_server(server + path)
    assert (check.state, words in check.message) == (state, True), check
    assert password is None or password not in check.message


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/api", "127.0.0.1:4200/api", "http://[/api"])
def test_a_server_that_does_not_answer_is_broken(url):
    check = prefect_server(url)
    assert (check.state, "does not answer" in check.message) == ("broken", True)
