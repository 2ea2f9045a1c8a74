"""Who may call the gateway: passwords, origins, host names, and how much they may send."""

import base64
import gc
import socket

import pytest
from serving import say

from understudy.errors import InvalidInput
from understudy.gateway.http.call import MAX_BODY_BYTES
from understudy.gateway.http.serve import check_bind

SECRET = {"username": "opencode", "password": "pa:ss wörd"}


def token(user="opencode", password=SECRET["password"]):
    return base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("url", ["/", "/global/health", "/event", "/doc", "/session", "/nope"])
def test_without_the_password_everything_is_closed(served, url):
    client = served(access=SECRET).client()
    answer = client.get(url)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Basic realm="Secure Area"'
    assert answer.content == b""


@pytest.mark.parametrize(
    "header",
    [
        f"Basic {token(password='wrong')}",
        f"Basic {token(user='somebody')}",
        f"Bearer {token()}",
        "Basic !!!",
        "Basic",
        token(),
    ],
)
def test_wrong_credentials_are_refused(served, header):
    client = served(access=SECRET).client(headers={"authorization": header})
    assert client.get("/session").status_code == 401


def test_the_password_opens_by_header_and_by_query(served):
    server = served(access=SECRET)
    client = server.client(headers={"authorization": f"Basic {token()}"})
    assert client.get("/session").json() == []
    plain = server.client()
    assert plain.get("/session", params={"auth_token": token()}).json() == []
    assert plain.get("/session", params={"auth_token": "x"}).status_code == 401


def test_the_api_of_the_next_generation_is_refused_in_its_own_words(served):
    client = served(access=SECRET).client()
    assert client.get("/api/session").json()["_tag"] == "UnauthorizedError"


def test_browsers_of_this_machine_and_of_named_origins_may_call(served):
    client = served(access={**SECRET, "origins": ["https://app.example"]}).client()
    for origin in ("http://localhost:5173", "https://app.example"):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        answer = client.options("/session", headers=headers)
        assert answer.status_code == 204
        assert answer.headers["access-control-allow-origin"] == origin
        assert "PATCH" in answer.headers["access-control-allow-methods"]


def test_pages_from_elsewhere_may_not_call(served):
    client = served().client()
    for origin in ("https://evil.example", "http://localhost.evil.example", "null"):
        answer = client.post("/session", headers={"origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    assert client.get("/session").json() == []


def test_a_name_that_somebody_pointed_at_us_is_refused(served):
    server = served()
    assert server.client(headers={"host": "evil.example:80"}).get("/session").status_code == 403
    assert server.client(headers={"host": "localhost:4096"}).get("/session").status_code == 200
    assert server.client(headers={"host": "[::1]:4096"}).get("/session").status_code == 200


def test_a_body_is_bounded_however_it_is_sent(served):
    client = served().client()
    session = client.post("/session").json()["id"]
    big = b" " * (MAX_BODY_BYTES + 1)

    def pieces():
        for _ in range(MAX_BODY_BYTES // 65536 + 2):
            yield b" " * 65536

    for content in (big, pieces()):
        answer = client.post(f"/session/{session}/message", content=content)
        assert answer.status_code == 413
    assert client.post(f"/session/{session}/message", json=say("still here")).status_code == 200


def test_unknown_paths_and_methods_are_answered_in_json(served):
    client = served().client()
    for method, path, status in (("GET", "/nope", 404), ("PUT", "/session", 405)):
        answer = client.request(method, path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
        assert answer.json()["data"]["message"]


def test_a_shell_is_not_offered_to_a_network_without_a_password():
    for hostname in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(InvalidInput, match="--insecure"):
            check_bind(hostname, password="", insecure=False)
        check_bind(hostname, password="x", insecure=False)
        check_bind(hostname, password="", insecure=True)
    for hostname in ("127.0.0.1", "::1", "localhost"):
        check_bind(hostname, password="", insecure=False)


def test_a_client_that_never_reads_does_not_outlive_the_server(served):
    server = served()
    client = server.client()
    session = client.post("/session", json={}).json()
    client.post(f"/session/{session['id']}/message", json=say("x" * 8_000_000))
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as deaf:
        deaf.sendall(
            f"GET /session/{session['id']}/message HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        )
        assert deaf.recv(1) == b"H"
        server.stop()
        gc.collect()  # a connection left behind would warn, and that is an error here
