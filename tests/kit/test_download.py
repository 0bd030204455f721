"""Downloads against real servers that misbehave, the cache, and what a cluster remembers."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from recipes.kit.choices import Choices
from recipes.kit.download import Cache, Desk, NotServed, Patience, Unreachable, WrongBytes, fetch
from recipes.kit.errors import BakeError
from recipes.kit.progress import Lines
from recipes.kit.registry import pull_image, split_reference
from tests.servers import Server, body, serving, status

DATA = bytes(range(256)) * 8192  # 2 MiB
SHA256 = hashlib.sha256(DATA).hexdigest()
DIGEST = f"sha256:{SHA256}"
QUICK = Patience(connect=0.5, read=0.3, attempts=3, pause=0.01)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy and no CA of the machine that runs the tests."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in (
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
            "SSL_CERT_FILE",
            "SSL_CERT_DIR",
        ):
            monkeypatch.delenv(name)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    choices = Choices(tmp_path / "secrets" / "choices.json")
    return Desk(build=tmp_path / "build", progress=Lines(), choices=choices, patience=QUICK)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as told:
        yield told


def leftovers(desk: Desk) -> list[str]:
    """Everything in the cache that is neither a good file nor a lock."""
    root = desk.cache.root
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if path.parts[0] != "sha256" and path.suffix != ".lock")


def test_fetches_once_and_then_needs_no_network(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [body(DATA)]
    for _ in range(2):
        assert fetch(f"{server.url}/file", DIGEST, desk).read_bytes() == DATA
    assert server.paths() == ["/file"]
    assert fetch("https://nowhere.invalid/file", DIGEST, desk) == desk.cache.path(SHA256)
    assert leftovers(desk) == []


def test_goes_on_where_a_connection_broke_off(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [body(DATA, cut=1 << 20), body(DATA)]
    assert fetch(f"{server.url}/file", DIGEST, desk).read_bytes() == DATA
    again = server.requests[1][1]
    offset = int(again["Range"].removeprefix("bytes=").rstrip("-"))
    assert 0 < offset <= 1 << 20
    assert again["If-Range"] == f'"{SHA256[:8]}"'


def test_goes_on_in_a_later_run(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [body(DATA, cut=1 << 20), status(503)]
    with pytest.raises(Unreachable, match="what has come is kept"):
        fetch(f"{server.url}/file", DIGEST, desk)
    assert desk.cache.find(SHA256) is None  # a piece is never taken for the whole
    later = Desk(build=desk.build, progress=Lines(), choices=desk.choices, patience=QUICK)
    server.answers["/file"] = [body(DATA)]
    assert fetch(f"{server.url}/file", DIGEST, later).read_bytes() == DATA
    assert "Range" in server.requests[-1][1]


def test_many_cuts_are_no_reason_to_give_up_while_it_goes_on(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [body(DATA, cut=300_000)]
    assert fetch(f"{server.url}/file", DIGEST, desk).read_bytes() == DATA
    assert len(server.requests) > QUICK.attempts


def test_starts_again_when_the_server_ignores_ranges(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [body(DATA, cut=1 << 20), body(DATA, ranges=False)]
    assert fetch(f"{server.url}/file", DIGEST, desk).read_bytes() == DATA
    assert "Range" in server.requests[1][1]


def test_starts_again_when_the_file_changed_meanwhile(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [body(bytes(len(DATA)), cut=1 << 20, etag="old"), body(DATA, etag="new")]
    assert fetch(f"{server.url}/file", DIGEST, desk).read_bytes() == DATA


def test_a_piece_that_proves_wrong_costs_one_more_download(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [body(bytes(len(DATA)), cut=1 << 20, etag="liar"), body(DATA, etag="liar")]
    assert fetch(f"{server.url}/file", DIGEST, desk).read_bytes() == DATA
    assert len(server.requests) == 3
    assert "Range" not in server.requests[2][1]


def test_a_length_that_is_too_long_does_no_harm(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [body(DATA, length=len(DATA) + 100)]
    assert fetch(f"{server.url}/file", DIGEST, desk).read_bytes() == DATA


def test_a_length_that_is_too_short_is_wrong_bytes(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [body(DATA, length=len(DATA) - 100)]
    with pytest.raises(WrongBytes):
        fetch(f"{server.url}/file", DIGEST, desk)


def test_wrong_bytes_are_set_aside_and_not_asked_for_again(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [body(b"wrong")]
    with pytest.raises(WrongBytes) as caught:
        fetch(f"{server.url}/file", DIGEST, desk)
    assert server.paths() == ["/file"]
    assert DIGEST in str(caught.value)
    assert hashlib.sha256(b"wrong").hexdigest() in str(caught.value)
    [rejected] = leftovers(desk)
    assert rejected.startswith("rejected/")
    assert (desk.cache.root / rejected).read_bytes() == b"wrong"
    assert desk.cache.find(SHA256) is None


def test_not_served(desk: Desk, server: Server) -> None:
    for code in (403, 404):
        server.answers["/file"] = [status(code)]
        with pytest.raises(NotServed) as caught:
            fetch(f"{server.url}/file", DIGEST, desk)
        assert caught.value.status == code
    assert len(server.requests) == 2
    assert not desk.silent_hosts


def test_503_then_well(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [status(503, Retry_After="0"), status(502), body(DATA)]
    assert fetch(f"{server.url}/file", DIGEST, desk).read_bytes() == DATA


def test_a_host_that_stays_sick_is_not_asked_again(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [status(503)]
    with pytest.raises(Unreachable):
        fetch(f"{server.url}/file", DIGEST, desk)
    asked = len(server.requests)
    assert asked == QUICK.attempts
    with pytest.raises(Unreachable, match="earlier in this run"):
        fetch(f"{server.url}/other", DIGEST, desk)
    assert len(server.requests) == asked


def test_a_stalled_connection_is_dropped_and_resumed(desk: Desk, server: Server) -> None:
    release = threading.Event()
    server.answers["/file"] = [body(DATA, cut=1 << 20, stall=release), body(DATA)]
    try:
        assert fetch(f"{server.url}/file", DIGEST, desk).read_bytes() == DATA
    finally:
        release.set()
    assert "Range" in server.requests[1][1]


def test_a_host_that_takes_no_connection_is_asked_once(desk: Desk) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(Unreachable, match="does not take connections"):
            fetch(f"http://127.0.0.1:{port}/file", DIGEST, desk)
    assert desk.silent_hosts == {f"127.0.0.1:{port}"}
    with pytest.raises(Unreachable, match="earlier in this run"):
        fetch(f"http://127.0.0.1:{port}/other", DIGEST, desk)


def test_redirect(desk: Desk, server: Server) -> None:
    with serving() as elsewhere:
        server.answers["/file"] = [status(302, Location=f"{elsewhere.url}/there")]
        elsewhere.answers["/there"] = [body(DATA)]
        got = fetch(f"{server.url}/file", DIGEST, desk, headers={"Authorization": "Bearer secret"})
        assert got.read_bytes() == DATA
        assert server.requests[0][1]["Authorization"] == "Bearer secret"
        assert "Authorization" not in elsewhere.requests[0][1]  # another host has no business with it
    server.answers["/round"] = [status(302, Location="/round")]
    with pytest.raises(NotServed, match="without end"):
        fetch(f"{server.url}/round", "sha256:" + "0" * 64, desk)


def private_ca(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate that signs itself, for name, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    try:
        san: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        san = x509.DNSName(name)
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    certificate = (
        builder.not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([san]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    encoded = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(encoded)
    return folder / "ca.pem", folder / "key.pem"


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_private_ca(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    certificate, key = private_ca(tmp_path, "127.0.0.1")
    with serving((certificate, key)) as server:
        server.answers["/file"] = [body(DATA)]
        with pytest.raises(Unreachable, match="REQUESTS_CA_BUNDLE"):
            fetch(f"{server.url}/file", DIGEST, desk)
        desk.silent_hosts.clear()
        monkeypatch.setenv(variable, str(certificate))
        assert fetch(f"{server.url}/file", DIGEST, desk).read_bytes() == DATA


def test_a_ca_file_that_is_not_there_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent.pem")
    with pytest.raises(BakeError, match="mend REQUESTS_CA_BUNDLE"):
        fetch("https://127.0.0.1:1/file", DIGEST, desk)


def test_proxy_from_the_environment(desk: Desk, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("http_proxy", server.url)
    server.answers["http://upstream.invalid/file"] = [body(DATA)]
    assert fetch("http://upstream.invalid/file", DIGEST, desk).read_bytes() == DATA


def test_https_through_a_proxy(desk: Desk, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = private_ca(tmp_path, "upstream.invalid")
    monkeypatch.setenv("https_proxy", server.url)
    with pytest.raises(Unreachable, match="proxy refused"):
        fetch("https://upstream.invalid/file", DIGEST, desk)
    desk.silent_hosts.clear()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving((certificate, key)) as upstream:
        server.tunnel = upstream.address
        upstream.answers["/file"] = [body(DATA)]
        assert fetch("https://upstream.invalid/file", DIGEST, desk).read_bytes() == DATA
    assert server.paths()[-1] == "CONNECT upstream.invalid:443"


def test_mirror_folder(desk: Desk, tmp_path: Path) -> None:
    desk.mirror = str(tmp_path / "mirror")
    with pytest.raises(BakeError, match="neither a URL nor a folder"):
        fetch("https://upstream.invalid/a/file", DIGEST, desk)
    file = tmp_path / "mirror/upstream.invalid/a/file"
    file.parent.mkdir(parents=True)
    with pytest.raises(NotServed, match="not in the mirror"):
        fetch("https://upstream.invalid/a/file", DIGEST, desk)
    file.write_bytes(b"wrong")
    with pytest.raises(WrongBytes):
        fetch("https://upstream.invalid/a/file", DIGEST, desk)
    assert file.read_bytes() == b"wrong"  # the mirror itself is left alone
    file.write_bytes(DATA)
    assert fetch("https://upstream.invalid/a/file", DIGEST, desk).read_bytes() == DATA
    assert file.exists()


def test_mirror_url(desk: Desk, server: Server) -> None:
    desk.mirror = f"{server.url}/mirror/"
    server.answers["/mirror/upstream.invalid/a/file"] = [body(DATA)]
    assert fetch("https://upstream.invalid/a/file", DIGEST, desk).read_bytes() == DATA


def test_sha512(desk: Desk, server: Server) -> None:
    server.answers["/file"] = [body(DATA)]
    digest = f"sha512:{hashlib.sha512(DATA).hexdigest()}"
    for _ in range(2):
        assert fetch(f"{server.url}/file", digest, desk) == desk.cache.path(SHA256)
    assert len(server.requests) == 1


def test_a_malformed_digest_is_refused(desk: Desk) -> None:
    for digest in (SHA256, "sha256:" + "g" * 64, "sha256:abc", "md5:" + "0" * 32):
        with pytest.raises(BakeError, match="not a digest"):
            fetch("https://upstream.invalid/file", digest, desk)


def test_two_at_once_fetch_once(desk: Desk, server: Server, tmp_path: Path) -> None:
    server.answers["/file"] = [body(DATA)]
    desks = [Desk(build=desk.build, progress=Lines(), choices=desk.choices, patience=QUICK) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda each: fetch(f"{server.url}/file", DIGEST, each).read_bytes(), desks))
    assert got == [DATA] * 4
    assert len(server.requests) == 1


def test_cache_notices_damage(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    new = tmp_path / "new"
    new.write_bytes(DATA)
    new.chmod(0o600)
    path = cache.add(new, SHA256)
    assert cache.find(SHA256) == path
    assert not new.exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.write_bytes(b"damaged")
    assert cache.find(SHA256) is None
    assert not path.exists()
    assert (tmp_path / f"cache/rejected/{SHA256}.damaged").read_bytes() == b"damaged"


def test_choices_are_private_and_survive_two_writers(tmp_path: Path) -> None:
    path = tmp_path / "secrets/choices.json"
    assert Choices(path).get("components", "etcd") is None
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: Choices(path).remember("components", str(i), {"source": "release"}), range(40)))
    assert len(json.loads(path.read_text())["components"]) == 40
    assert Choices(path).get("components", "7") == {"source": "release"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("{")
    with pytest.raises(BakeError, match="damaged"):
        Choices(path).get("components", "7")


# ---- registries -----------------------------------------------------------------------------------------------------


def blob_of(value: object) -> tuple[bytes, str]:
    data = json.dumps(value).encode()
    return data, f"sha256:{hashlib.sha256(data).hexdigest()}"


def publish(server: Server, registry: str, repository: str) -> str:
    """An image for amd64 and arm64, behind a token; returns the index's digest."""
    prefix = f"{registry}/v2/{repository}"
    entries = []

    def guarded(data: bytes) -> list[object]:
        def answer(request: object) -> None:
            allowed = request.headers.get("Authorization") == "Bearer let-me-in"  # type: ignore[attr-defined]
            challenge = f'Bearer realm="{server.url}/token",service="reg",scope="repository:{repository}:pull"'
            (body(data) if allowed else status(401, WWW_Authenticate=challenge))(request)  # type: ignore[arg-type]

        return [answer]

    for arch in ("amd64", "arm64"):
        layer = f"layer for {arch}".encode()
        config, config_digest = blob_of({"architecture": arch, "os": "linux"})
        layer_digest = f"sha256:{hashlib.sha256(layer).hexdigest()}"
        manifest, manifest_digest = blob_of(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": {"mediaType": "c", "digest": config_digest, "size": len(config)},
                "layers": [{"mediaType": "l", "digest": layer_digest, "size": len(layer)}],
            }
        )
        platform = {"os": "linux", "architecture": arch}
        entries.append({"mediaType": "m", "digest": manifest_digest, "size": len(manifest), "platform": platform})
        server.answers[f"{prefix}/manifests/{manifest_digest}"] = guarded(manifest)  # type: ignore[assignment]
        for digest, data in ((config_digest, config), (layer_digest, layer)):
            server.answers[f"{prefix}/blobs/{digest}"] = guarded(data)  # type: ignore[assignment]
    index, index_digest = blob_of({"schemaVersion": 2, "manifests": entries})
    server.answers[f"{prefix}/manifests/{index_digest}"] = guarded(index)  # type: ignore[assignment]
    return index_digest


def test_pulls_an_image_with_a_token(desk: Desk, server: Server) -> None:
    desk.mirror = f"{server.url}/m"
    digest = publish(server, "/m/registry.invalid", "a/pause")
    token = f"/m/{server.url.removeprefix('http://')}/token?service=reg&scope=repository%3Aa%2Fpause%3Apull"
    given = json.dumps({"token": "let-me-in"}).encode()
    server.answers[token] = [body(given)]
    image = pull_image("registry.invalid/a/pause:3", digest, "arm64", desk)
    assert [layer.path.read_bytes() for layer in image.layers] == [b"layer for arm64"]
    assert json.loads(image.config.path.read_bytes())["architecture"] == "arm64"
    assert image.manifest.size == image.manifest.path.stat().st_size
    assert server.paths().count(token) == 1
    server.requests.clear()
    pull_image("registry.invalid/a/pause:3", digest, "arm64", desk)
    assert server.requests == []  # the second time from the cache


def test_an_image_without_the_architecture_is_refused(desk: Desk, tmp_path: Path) -> None:
    index, digest = blob_of({"manifests": [{"digest": "x", "platform": {"os": "linux", "architecture": "s390x"}}]})
    folder = tmp_path / "mirror/registry.invalid/v2/a/manifests"
    folder.mkdir(parents=True)
    (folder / digest).write_bytes(index)
    desk.mirror = str(tmp_path / "mirror")
    with pytest.raises(BakeError, match="only for linux/s390x"):
        pull_image("registry.invalid/a", digest, "amd64", desk)


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("registry.k8s.io/pause:3.10.2", ("registry.k8s.io", "pause")),
        ("ghcr.io/a/b:v1@sha256:00", ("ghcr.io", "a/b")),
        ("localhost:5000/a", ("localhost:5000", "a")),
        ("nginx:1", ("registry-1.docker.io", "library/nginx")),
        ("docker.io/a/b", ("registry-1.docker.io", "a/b")),
        ("a/b@sha256:00", ("registry-1.docker.io", "a/b")),
    ],
)
def test_references(reference: str, parts: tuple[str, str]) -> None:
    assert split_reference(reference) == parts
