"""The client of the protocol over HTTP: what it sends, what it makes of replies, and that the key is never shown."""

import json
import sys
import time

import pytest

from dft.errors import UserError
from dft.judging.endpoint import Endpoint, EndpointConfig, Reply, RequestFailed, check_url
from tests.judging.protocol import completion

HELLO = [{"role": "user", "content": "Hello"}]
SECRET = "sk-a-very-secret-key"


def endpoint(server, **settings) -> Endpoint:
    return Endpoint(EndpointConfig("m", server.url, **{"max_retries": 0, **settings}))


def test_what_is_sent_and_what_comes_back(server):
    server.reply = lambda body: (200, completion("Hi"))
    assert endpoint(server).ask(HELLO, seed=7) == Reply("Hi", False, 10, 5)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer none"
    assert body == {"model": "m", "messages": HELLO, "temperature": 1.0, "max_tokens": 1024, "seed": 7}


def test_further_fields_replace_those_of_the_program(server):
    server.reply = lambda body: (200, completion("Hi"))
    endpoint(server, fields={"seed": None, "max_tokens": None, "max_completion_tokens": 9}).ask(HELLO, seed=7)
    assert server.requests[0][2] == {
        "model": "m", "messages": HELLO, "temperature": 1.0, "max_completion_tokens": 9
    }  # fmt: skip


def test_the_url_and_the_key_may_come_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.reply = lambda body: (200, completion("Hi"))
    Endpoint(EndpointConfig("m")).ask(HELLO, seed=0)
    assert server.requests[0][1]["authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (completion(None), Reply("", False, 10, 5)),
        (completion("Hi", usage=None), Reply("Hi")),
        (completion("", choices=[{"index": 0, "finish_reason": "length", "message": {"content": "H"}}]),
         Reply("H", True, 10, 5)),
        (completion("", choices=[{"index": 0, "finish_reason": "stop", "message": None}]), Reply("", False, 10, 5)),
    ],
)  # fmt: skip
def test_replies_without_text_counts_or_end(server, body, expected):
    server.reply = lambda _: (200, body)
    assert endpoint(server).ask(HELLO, seed=0) == expected


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (500, {"error": {"message": "broken"}}, "http_500"),
        (404, {"error": {"message": "no such model"}}, "http_404"),
        (200, b"<html>hello</html>", "bad_response"),
        (200, {"choices": []}, "bad_response"),
        (200, {"choices": None}, "bad_response"),
        (200, ["a list"], "bad_response"),
        (200, "a text", "bad_response"),
        (200, None, "bad_response"),
    ],
)
def test_failures_have_reasons(server, status, body, reason):
    server.reply = lambda _: (status, body)
    with pytest.raises(RequestFailed) as raised:
        endpoint(server).ask(HELLO, seed=0)
    assert raised.value.reason == reason


def test_the_client_tries_again(server):
    """Rejects a client of our own that gives up at the first failure."""
    answers = [(429, {"error": {"message": "slower"}}), (200, completion("Hi"))]
    server.reply = lambda _: answers.pop(0)
    assert endpoint(server, max_retries=1).ask(HELLO, seed=0).text == "Hi"
    assert len(server.requests) == 2


def test_a_server_that_is_silent_or_gone(server):
    server.reply = lambda _: (time.sleep(1), (200, completion("late")))[1]
    with pytest.raises(RequestFailed) as raised:
        endpoint(server, timeout=0.2).ask(HELLO, seed=0)
    assert (raised.value.reason, raised.value.detail) == ("timeout", "no reply within 0.2 s")
    asked = endpoint(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(RequestFailed) as raised:
        asked.ask(HELLO, seed=0)
    assert raised.value.reason == "no_connection"
    with pytest.raises(UserError, match=r"no_connection: .*: start the server, or mend --endpoint"):
        asked.probe()


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "set the environment variable OPENAI_API_KEY"), (404, "mend --model"), (422, "--request"), (418, "later")],
)
def test_a_probe_names_the_remedy(server, status, remedy):
    server.reply = lambda _: (status, {"error": {"message": "because of this"}})
    with pytest.raises(UserError, match=f"the model m .http_{status}: .*because of this.*{remedy}"):
        endpoint(server).probe()


def test_the_key_is_not_shown(server, monkeypatch):
    """Some servers repeat it in their messages."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.reply = lambda _: (401, {"error": {"message": f"the key {SECRET} is wrong"}})
    with pytest.raises(UserError, match="the key HIDDEN is wrong") as raised:
        endpoint(server).probe()
    assert SECRET not in str(raised.value)


def test_neither_endpoint_nor_key():
    with pytest.raises(UserError, match="neither an endpoint nor a key is given.*--endpoint.*OPENAI_API_KEY"):
        Endpoint(EndpointConfig("m"))


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "ftp://a/v1", "http://", "http://[::1/v1"])
def test_what_is_no_url(url):
    with pytest.raises(UserError, match="--endpoint or OPENAI_BASE_URL is .*; it must be a URL"):
        check_url(url, has_key=False)


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(UserError, match="holds a user name or a password") as raised:
        check_url("http://me:hunter2@host/v1", has_key=False)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "has_key", "warns"),
    [
        ("http://judge.example/v1", True, True),
        ("http://judge.example/v1", False, False),
        ("https://judge.example/v1", True, False),
        ("http://127.0.0.1:80/v1", True, False),
        ("http://[::1]/v1", True, False),
        ("http://localhost/v1", True, False),
        ("http://10.0.0.1/v1", True, True),
    ],
)
def test_a_key_without_encryption_is_warned_of(caplog, url, has_key, warns):
    check_url(url, has_key)
    assert ("without encryption" in caplog.text) == warns


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install -e \.\[judge\] -c constraints.txt"):
        Endpoint(EndpointConfig("m", "http://127.0.0.1:1/v1"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "--temperature and --max_retries must be at least 0"),
        ({"max_tokens": 0}, "--max_tokens at least 1"),
        ({"timeout": 0}, "--timeout above 0"),
        ({"max_retries": -1}, "--max_retries must be at least 0"),
        ({"fields": json.loads('{"stream": true}')}, "--request can't set 'stream'"),
    ],
)
def test_settings_outside_their_range(settings, message):
    with pytest.raises(UserError, match=message):
        EndpointConfig("m", **settings)
