"""That the scripts which a bake is compared with do the same work."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from cryptography import x509

from tests.bench import others
from tests.conftest import ROOT


def test_certificates_say_the_same(tmp_path: Path) -> None:
    cas, listed = others.authorities(tmp_path / "cas"), tmp_path / "list"
    lines = others.requests(2)
    listed.write_text("".join(lines))
    outs = tmp_path / "ours", tmp_path / "theirs"
    commands = others.mint(cas, listed, outs[0]), others.by_hand("certificates", cas, listed, outs[1])
    for out, command in zip(outs, commands, strict=True):
        out.mkdir()
        subprocess.run(command, cwd=ROOT, check=True)
    others.check(lines, cas, *outs)
    for path in sorted(outs[0].glob("*/*.crt")):
        pair = [x509.load_pem_x509_certificate((out / path.relative_to(outs[0])).read_bytes()) for out in outs]
        for kind in (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage, x509.SubjectAlternativeName):
            ours, theirs = (
                [extension.value for extension in each.extensions if isinstance(extension.value, kind)] for each in pair
            )
            assert ours == theirs, path


def test_each_worker_gets_its_own_files(tmp_path: Path) -> None:
    for part in ("root/etc", "seed"):
        (tmp_path / "template" / part).mkdir(parents=True)
    (tmp_path / "template/root/etc/node.env").write_text("NODE=NAME ADDRESS TOKEN\n")
    (tmp_path / "template/seed/user-data").write_text("#cloud-config\n")
    (tmp_path / "list").write_text("worker-1 10.0.0.1\nworker-2 10.0.0.2\nworker-3 10.0.0.3\n")
    key, out = tmp_path / "key", tmp_path / "out"
    out.mkdir()
    generate = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(key)]
    subprocess.run(generate, check=True, capture_output=True)
    subprocess.run(others.by_hand("workers", tmp_path / "template", key, tmp_path / "list", out), check=True)
    assert sorted(path.name for path in (out / "seeds").iterdir()) == [f"worker-{at}.iso" for at in (1, 2, 3)]
    with tarfile.open(out / "nodes" / "worker-2.tar.gz") as tar:
        node = tar.extractfile("./etc/node.env")
        assert node is not None
        name, address, token = node.read().decode().split()
    assert (name, address) == ("NODE=worker-2", "10.0.0.2") and len(token) == 6 + 1 + 16
    assert others.members(out / "nodes" / "worker-2.tar.gz") == ["SHA256SUMS", "SHA256SUMS.sig", "etc/node.env"]


def test_a_program_that_is_lacking_is_told_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name in ("pigz", "awk") else found(name) or name)
    with pytest.raises(SystemExit, match="apt install pigz mawk"):
        others.main("a desk", 1)
