"""Payloads in a registry: pushed to a small one that fails as told, and to the CNCF's own."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from recipes import publish, report
from recipes.bake import Bake
from recipes.kit import distribution, formats, push
from recipes.kit.choices import Choices
from recipes.kit.distribution import Repository
from recipes.kit.download import Desk, NotServed, Patience, Unreachable
from recipes.kit.errors import BakeError
from recipes.kit.progress import Lines
from recipes.payload import Baked
from tests import artifacts, registries, samples, servers
from tests.registries import PASSWORD, USER, Small
from tests.servers import Server
from tests.test_fetch import Client
from tests.test_first_boot import run

DATA = bytes(range(256)) * 100_000  # 26 MB: four pieces
SHA256 = hashlib.sha256(DATA).hexdigest()
CLUSTER = samples.ha()


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for config.json that is not the person's."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    patience = Patience(pause=0.01, attempts=3)
    return Desk(build=tmp_path / "build", progress=Lines(), choices=Choices(tmp_path / "choices"), patience=patience)


@pytest.fixture
def baked(tmp_path: Path) -> Baked:
    path = tmp_path / "worker-amd64.tar.gz"
    path.write_bytes(DATA)
    return Baked(path, len(DATA), "5" * 64, SHA256)


@pytest.fixture
def small() -> Iterator[Small]:
    with registries.small() as made:
        yield made


def sent(baked: Baked, host: str, desk: Desk, scheme: str = "http") -> str:
    repository = Repository(f"{scheme}://{host}", "site/nodebake")
    return publish.publish(CLUSTER, "worker", "amd64", baked, repository, desk)


def log_in(folder: Path, host: str, password: str = PASSWORD) -> None:
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def certificate(folder: Path) -> tuple[Path, Path]:
    folder.mkdir()
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x -days 1 -keyout k -out c"
    )
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True, capture_output=True
    )
    return folder / "c", folder / "k"


def test_a_payload_is_one_artifact(baked: Baked, small: Small, desk: Desk) -> None:
    reference = sent(baked, small.host, desk)
    named = reference.rpartition(":")[2]
    assert reference == f"{small.host}/site/nodebake:ha-worker-amd64-{SHA256[:16]}"
    document = json.loads(small.manifests[named])
    assert document["artifactType"] == "application/vnd.nodebake.payload.v1"
    assert small.blobs[document["config"]["digest"]] == b"{}"
    [layer] = document["layers"]
    assert (layer["digest"], layer["size"]) == (f"sha256:{SHA256}", len(DATA))
    assert small.blobs[layer["digest"]] == DATA
    assert layer["annotations"] == {"org.opencontainers.image.title": "worker-amd64.tar.gz"}


def test_what_is_there_is_not_sent_again(baked: Baked, small: Small, desk: Desk) -> None:
    reference = sent(baked, small.host, desk)
    small.requests.clear()
    assert sent(baked, small.host, desk) == reference
    assert [method for method, _ in small.requests] == ["HEAD", "HEAD", "HEAD"]


def test_the_same_payload_is_the_same_artifact(baked: Baked) -> None:
    assert publish.manifest(CLUSTER, "worker", "amd64", baked) == publish.manifest(
        samples.ha(), "worker", "amd64", replace(baked, path=Path("elsewhere"))
    )
    other = replace(baked, sha256="0" * 64)
    assert publish.tag(CLUSTER, "worker", "amd64", other) != publish.tag(CLUSTER, "worker", "amd64", baked)


@pytest.mark.parametrize("broken", [[0], [2], [1000], [push.PIECE - 1], [None, 12345, None, 0], [5, 5]])
def test_what_broke_off_goes_on_with_what_is_lacking(
    baked: Baked, small: Small, desk: Desk, broken: list[int | None]
) -> None:
    small.broken = broken
    sent(baked, small.host, desk)
    assert small.blobs[f"sha256:{SHA256}"] == DATA
    assert len(small.uploads) == 2, "never begun anew"


def test_a_registry_that_is_busy_is_asked_again(baked: Baked, small: Small, desk: Desk) -> None:
    small.refusing = [503, 429]
    sent(baked, small.host, desk)
    small.refusing = [503] * 3
    with pytest.raises(Unreachable, match=r"gave up after 3 attempts in a row: .* says 503"):
        sent(baked, small.host, desk)


def test_what_a_registry_refuses_is_told(baked: Baked, small: Small, desk: Desk) -> None:
    small.refusing = [403]
    with pytest.raises(NotServed, match="says 403 Forbidden"):
        sent(baked, small.host, desk)
    changed = replace(baked, sha256="0" * 64)
    with pytest.raises(NotServed, match=r"says 400 Bad Request \(DIGEST_INVALID\)"):
        sent(changed, small.host, desk)


def test_nobody_there_is_told(baked: Baked, desk: Desk) -> None:
    with registries.small() as gone:
        pass
    with pytest.raises(Unreachable, match="does not take connections"):
        sent(baked, gone.host, desk)


def test_a_password_is_never_sent_in_the_clear(baked: Baked, desk: Desk, no_login: Path) -> None:
    with servers.serving() as server:
        host = server.url.removeprefix("http://")
        log_in(no_login, host)
        path = f"/v2/site/nodebake/blobs/sha256:{SHA256}"
        for challenge in ('Basic realm="x"', f'Bearer realm="{server.url}/token"'):
            server.answers[path] = [servers.status(401, WWW_Authenticate=challenge)]
            with pytest.raises(NotServed, match="asks for the password in the clear"):
                publish.publish(CLUSTER, "worker", "amd64", baked, Repository(server.url, "site/nodebake"), desk)
        assert all("Authorization" not in headers for _, headers in server.requests)


def test_what_a_registry_sends_elsewhere_goes_without_its_password(desk: Desk) -> None:
    """As an upload whose place is another host's."""
    with servers.serving() as own, servers.serving() as other, push.Pusher(Repository(own.url, "a"), desk) as pusher:
        pusher._authorization = "Basic secret"
        for server in (own, other):
            pusher._send("GET", f"{server.url}/x", {}, b"")
        assert [headers.get("Authorization") for _, headers in own.requests] == ["Basic secret"]
        assert [headers.get("Authorization") for _, headers in other.requests] == [None]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"auths": {"HOST": {"auth": "no base64"}}}', '{"auths": {"HOST": {"auth": "eA=="}}}']
)
def test_credentials_that_cannot_be_read_are_told(no_login: Path, text: str) -> None:
    (no_login / "config.json").write_text(text.replace("HOST", "r.test"))
    with pytest.raises(BakeError, match=r"(?s)credentials cannot be read.*docker login r.test") as told:
        push.credentials("r.test")
    assert str(no_login) in str(told.value)


def test_credentials_are_a_hosts_own(no_login: Path) -> None:
    assert push.credentials("r.test") is None
    log_in(no_login, "r.test:5000")
    assert push.credentials("r.test:5000") == (USER, PASSWORD)
    assert push.credentials("r.test") is None


def test_podmans_login_is_known_too(no_login: Path, tmp_path: Path) -> None:
    """containers-auth.json(5): in the runtime folder, in the same form."""
    podman = tmp_path / "run/containers"
    podman.mkdir(parents=True)
    log_in(no_login, "r.test")
    (no_login / "config.json").rename(podman / "auth.json")
    assert push.credentials("r.test") == (USER, PASSWORD)
    log_in(no_login, "docker.test")
    assert push.credentials("docker.test") == (USER, PASSWORD)


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("http://10.0.0.1:8080/a/", "http://10.0.0.1:8080/a/worker-amd64.tar.gz"),
        ("https://files.test", "https://files.test/worker-amd64.tar.gz"),
        ("oci://r.test:5000/nodebake", f"https://r.test:5000/v2/nodebake/blobs/sha256:{SHA256}"),
        ("oci+http://10.0.0.1/a/b-c", f"http://10.0.0.1/v2/a/b-c/blobs/sha256:{SHA256}"),
    ],
)
def test_where_a_machine_fetches_from(server: str, url: str) -> None:
    assert formats.payload_server(server) == server
    cluster = samples.ha(payload_server=server)
    thin = cluster.workers[0]._replace(media="thin")
    made = distribution.fetch(cluster, thin, sha256=SHA256, size=1)
    assert made is not None and (made.url, made.sha256, made.size) == (url, SHA256, 1)
    assert distribution.fetch(cluster, cluster.workers[0], sha256=SHA256, size=1) is None
    assert distribution.fetch(CLUSTER, thin, sha256=SHA256, size=1) is None


@pytest.mark.parametrize(
    "text",
    [
        "oci://r.test",
        "oci://r.test/",
        "oci://r.test/A",
        "oci://r.test/a:1",
        "oci:///a",
        "oci://u@r.test/a",
        "ocis://r.test/a",
    ],
)
def test_what_is_no_payload_server(text: str) -> None:
    with pytest.raises(formats.Malformed):
        formats.payload_server(text)


def test_the_load_of_the_server_is_told(tmp_path: Path, desk: Desk) -> None:
    """As soon as the payloads are there: of machines with thin media alone."""
    workers = [samples.node(f"worker-{i}", "worker", 1)._replace(media="thin") for i in range(500)]
    cluster = samples.ha(nodes=(*CLUSTER.control_planes, *workers), payload_server="oci://r.test/a")
    bake = Bake(cluster, desk, tmp_path / "secrets", artifacts.NOW, minting=False)
    assert "payloads from" not in report.cluster(bake)
    path = bake.payload("worker", "amd64")
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(181_000_000)
    told = " ".join(report.cluster(bake).split())
    assert "payloads from oci://r.test/a: 90 GB to 500 machines" in told
    assert (
        "13 min at 1 Gbit/s, 77 s at 10; within an hour by 1 server with 1 Gbit/s; workers begin within 15 min" in told
    )


# ---- the CNCF's registry


@pytest.mark.matrix
def test_a_machine_takes_its_payload_from_the_cncfs_registry(tmp_path: Path, desk: Desk) -> None:
    """Pushed by one, and fetched by first boot's own program: the whole way, by plain HTTP."""
    with registries.cncf(tmp_path / "registry") as host:
        cluster = samples.ha(payload_server=f"oci+http://{host}/nodebake")
        node = cluster.workers[0]._replace(media="thin")
        minted = artifacts.secrets(tmp_path, cluster)
        payload, thin = artifacts.bake(tmp_path, cluster, node, artifacts.Parts(tmp_path / "cache"), minted)
        missing = run("verify", "--root", tmp_path / "none", thin)
        assert missing.returncode == 66 and "the server says 404 Not Found" in missing.stderr
        data = payload.read_bytes()
        made = Baked(payload, len(data), "5" * 64, hashlib.sha256(data).hexdigest())
        publish.publish(cluster, "worker", "amd64", made, Repository(f"http://{host}", "nodebake"), desk)
        done = run("verify", "--root", tmp_path / "none", thin)
        assert done.returncode == 0 and f"/v2/nodebake/blobs/sha256:{made.sha256}" in done.stdout, done.stderr


@pytest.mark.matrix
def test_the_cncfs_registry_goes_on_where_it_was_cut(
    baked: Baked, tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with registries.cncf(tmp_path / "registry") as host:
        ask, cuts = push.Pusher._ask, [2]

        def cut(self: push.Pusher, method: str, *arguments: object, **named: object) -> object:
            answer = ask(self, method, *arguments, **named)  # type: ignore[arg-type]
            if method == "PATCH":
                cuts[0] -= 1
                if cuts[0] == 0:  # the answer to a piece that did arrive is lost
                    raise push._Again("cut")
            return answer

        monkeypatch.setattr(push.Pusher, "_ask", cut)
        reference = sent(baked, host, desk)
        assert registries.get(f"http://{host}/v2/site/nodebake/blobs/sha256:{SHA256}") == DATA
        named = reference.rpartition(":")[2]
        document = json.loads(registries.get(f"http://{host}/v2/site/nodebake/manifests/{named}", Accept=push.MANIFEST))
        assert document["layers"][0]["digest"] == f"sha256:{SHA256}"
        assert sent(baked, host, desk) == reference
        (tmp_path / "part").write_bytes(DATA[:1000])
        client = Client(Server(f"http://{host}"), tmp_path / "part")
        url = f"http://{host}/v2/site/nodebake/blobs/sha256:{SHA256}"
        done = client.fetch(url=url, sha256=SHA256, size=len(DATA))
        assert done.returncode == 0 and (tmp_path / "part").read_bytes() == DATA, done.stderr
        assert f'blobs/sha256:{SHA256} HTTP/1.1" 206 ' in (tmp_path / "registry" / "log").read_text()


@pytest.mark.matrix
def test_the_cncfs_registry_by_tls_and_password(
    baked: Baked, tmp_path: Path, desk: Desk, no_login: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = certificate(tmp_path / "tls")
    (tmp_path / "users").write_text(registries.HTPASSWD)
    auth = {"htpasswd": {"realm": "x", "path": str(tmp_path / "users")}}
    with registries.cncf(tmp_path / "registry", tls=tls, auth=auth) as host:
        with pytest.raises(Unreachable, match="did not prove who it is"):
            sent(baked, host, desk, "https")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tls[0]))
        with pytest.raises(NotServed, match="wants a password"):
            sent(baked, host, desk, "https")
        log_in(no_login, host, "another")
        with pytest.raises(NotServed, match="says 401"):
            sent(baked, host, desk, "https")
        log_in(no_login, host)
        assert sent(baked, host, desk, "https").startswith(host)


@pytest.mark.matrix
def test_the_cncfs_registry_by_token(
    baked: Baked, tmp_path: Path, desk: Desk, no_login: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its "silly" scheme asks for a token as the others do, and takes any."""
    tls = certificate(tmp_path / "tls")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tls[0]))
    with servers.serving(tls=tls) as tokens:
        auth = {"silly": {"realm": f"{tokens.url}/token", "service": "x"}}
        with registries.cncf(tmp_path / "registry", tls=tls, auth=auth) as host:
            log_in(no_login, host)
            scope = "scope=repository%3Asite%2Fnodebake%3Apull"
            answer = servers.body(b'{"token": "good"}', kind="application/json")
            for asked in (scope, f"{scope}%2Cpush"):
                tokens.answers[f"/token?service=x&{asked}"] = [answer]
            assert sent(baked, host, desk, "https").startswith(host)
            assert all(headers["Authorization"].startswith("Basic ") for _, headers in tokens.requests)
