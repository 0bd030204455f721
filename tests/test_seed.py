"""The NoCloud ISO as cloud-init and ISO readers see it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import seed
from recipes.kit import archive, atomic
from recipes.kit.model import Cluster, Link, Network, Node
from tests import artifacts, samples

NAMES = {"user-data", "meta-data", "network-config", "SHA256SUMS", "SHA256SUMS.sig", "first-boot", "node.tar.gz"}
BONDED = Network(
    links=(Link("nic0", "52:54:00:00:20:01"), Link("nic1", "52:54:00:00:20:02")),
    addresses=(samples.address("192.168.10.21/24"), samples.address("192.168.11.21/24")),
    bond="802.3ad",
    vlan=120,
    mtu=9000,
    gateway=IPv4Address("192.168.10.1"),
    nameservers=(IPv4Address("192.168.10.2"),),
    search=("example.org",),
)


def with_network(network: Network) -> tuple[Cluster, Node]:
    cluster = samples.ha()
    return cluster, cluster.workers[0]._replace(network=network)


def network(cluster: Cluster, node: Node) -> Any:
    return yaml.safe_load(seed.network_config(cluster, node))


def iso(tmp_path: Path, name: str = "seed.iso", mtime: int = 1_700_000_000) -> Path:
    tarball = tmp_path / "node.tar.gz"
    tarball.write_bytes(b"tarball" * 1000)
    cluster = samples.ha()
    documents = seed.documents(cluster, cluster.workers[0], sums="ab" * 32, sign=bytes)
    return seed.write(documents, tarball, tmp_path / name, mtime=mtime).path


@pytest.mark.parametrize(
    "command",
    [("bsdtar", "-tf"), ("isoinfo", "-R", "-f", "-i"), ("isoinfo", "-J", "-f", "-i"), ("xorriso", "-indev")],
    ids=" ".join,
)
def test_every_reader_finds_the_files(tmp_path: Path, command: tuple[str, ...]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    more = ("-find", "/") if command[0] == "xorriso" else ()
    told = subprocess.run([*command, iso(tmp_path), *more], capture_output=True, text=True, check=True).stdout
    assert {line.strip("'/") for line in told.splitlines()} >= NAMES


def test_the_label_is_what_cloud_init_looks_for(tmp_path: Path) -> None:
    data = iso(tmp_path).read_bytes()[16 * 2048 : 17 * 2048]
    assert data[1:6] == b"CD001" and data[40:72].decode().rstrip() == "cidata"


def test_the_tarball_in_it_is_the_tarball(tmp_path: Path) -> None:
    path = iso(tmp_path)
    out = subprocess.run(["bsdtar", "-xOf", path, "node.tar.gz"], capture_output=True, check=True).stdout
    assert out == (tmp_path / "node.tar.gz").read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_same_bytes_at_another_time_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = iso(tmp_path).read_bytes()
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    mask = os.umask(0o077)
    try:
        time.sleep(1.05)  # ISO times are whole seconds
        again = iso(tmp_path, "again.iso").read_bytes()
    finally:
        os.umask(mask)
        monkeypatch.undo()
        time.tzset()
    assert again == first
    assert iso(tmp_path, "later.iso", mtime=1_700_000_060).read_bytes() != first


def test_what_the_kernel_copies_is_what_pycdlib_would_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd").write_bytes(os.urandom(5_000_001))  # neither whole sectors nor whole chunks
    (tmp_path / "whole").write_bytes(os.urandom(2048 * 100))
    (tmp_path / "empty").write_bytes(b"")
    contents: dict[str, bytes | Path] = {"a": b"small", "z": b"last"}
    contents |= {name: tmp_path / name for name in ("odd", "whole", "empty")}
    direct = seed.write_iso(contents, tmp_path / "direct.iso", label="cidata", mtime=1)
    with monkeypatch.context() as patched:
        patched.setattr(seed, "_Direct", lambda path, _: path.open("rb"))
        plain = seed.write_iso(contents, tmp_path / "plain.iso", label="cidata", mtime=1)
    assert direct.path.read_bytes() == plain.path.read_bytes()
    assert direct.size == plain.size == direct.path.stat().st_size


@pytest.mark.parametrize("old", ["alike", "longer", "shorter", "more before it", "other", "another volume"])
def test_over_an_older_volume_the_same_bytes_come_out(
    tmp_path: Path, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pycdlib seeks over what is to be zero, so nothing of the older volume may be left there."""
    head = os.urandom(300_000)
    tarball, other = tmp_path / "new.tar.gz", tmp_path / "old.tar.gz"
    small: dict[str, bytes | Path] = {"a": b"small", "z": b"document"}

    def written(path: Path, name: str, **more: bytes | Path) -> Path:
        return seed.write_iso({**small, "n": path, **more}, tmp_path / name, label="cidata", mtime=1).path

    tarball.write_bytes(head + b"new tail")
    fresh = written(tarball, "fresh.iso").read_bytes()
    target = tmp_path / "kept.iso"
    if old == "other":
        target.write_bytes(b"\xff" * 900_000)
    else:
        tails = {"longer": os.urandom(90_000), "shorter": b""}
        other.write_bytes(head + tails.get(old, b"\xff\xfftail"))
        more: dict[str, dict[str, bytes | Path]] = {
            "more before it": {"b": b"\xff" * 5000},
            "another volume": {"o": other},
        }
        written(other, "kept.iso", **more.get(old, {}))
    monkeypatch.setattr(atomic, "WORTH_KEEPING", 1)
    number, copied, copy = target.stat().st_ino, list[int](), archive.copy_range

    def copying(source: Any, out: Any, length: int) -> None:
        copied.append(length)
        copy(source, out, length)

    monkeypatch.setattr(archive, "copy_range", copying)
    made = seed.write_iso({**small, "n": tarball}, target, label="cidata", mtime=1, keep=True)
    assert target.read_bytes() == fresh and made.size == len(fresh)
    assert target.stat().st_ino == number
    assert (sum(copied) < archive.PIECE) == (old in ("alike", "longer", "shorter", "another volume"))


def test_an_artifact_over_4_gib_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # 4 GiB of zeros need not reach the disk
    size = 4_300_000_000
    if shutil.disk_usage(tmp_path).free < 4 * size:
        pytest.skip("not enough room on the disk")
    large = tmp_path / "large.tar.gz"
    with large.open("wb") as file:
        file.truncate(size)
        file.seek(size - 3)
        file.write(b"end")
    target = tmp_path / "large.iso"
    try:
        (tmp_path / "z").write_bytes(b"last")
        contents: dict[str, bytes | Path] = {"node.tar.gz": large, "a": b"small", "z": tmp_path / "z"}
        seed.write_iso(contents, target, label="cidata", mtime=1)
        told = subprocess.run(["bsdtar", "-tvf", target], capture_output=True, text=True, check=True).stdout
        assert str(size) in told
        last = subprocess.run(["bsdtar", "-xOf", target, "z"], capture_output=True, check=True).stdout
        assert last == b"last"
    finally:
        large.unlink()
        target.unlink(missing_ok=True)


def test_payloads_travel_on_a_volume_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"payload")
    made = seed.write_payloads({"worker-amd64": tmp_path / "p"}, tmp_path / "p.iso", mtime=1)
    assert made.path.read_bytes()[16 * 2048 + 40 : 16 * 2048 + 72].rstrip() == b"nodebake"
    told = subprocess.run(["bsdtar", "-tf", made.path], capture_output=True, text=True, check=True).stdout
    assert "worker-amd64.tar.gz" in told.splitlines()


# -- user-data --------------------------------------------------------------------------------------------------------


def user_data(cluster: Cluster) -> dict[str, Any]:
    text = seed.user_data(cluster, cluster.workers[0])
    assert text.startswith(b"#cloud-config\n")
    config = yaml.safe_load(text)
    assert isinstance(config, dict)
    return config


def test_user_data_brings_people_and_first_boot() -> None:
    config = user_data(samples.ha())
    assert config["hostname"] == "worker-1" and config["ssh_pwauth"] is False
    assert config["users"][0]["ssh_authorized_keys"] == [samples.SSH_KEY]
    assert config["users"][0]["lock_passwd"] is True
    assert config["ssh_deletekeys"] is True and config["ssh"]["emit_keys_to_console"] is True
    files = {file["path"]: file for file in config["write_files"]}
    unit = files["/etc/systemd/system/nodebake-first-boot.service"]["content"]
    program = files["/var/lib/nodebake/first-boot"]
    assert "ExecStart=/bin/sh /var/lib/nodebake/first-boot install" in unit
    assert program["permissions"] == "0755" and program["content"].startswith("#!/bin/sh\n")
    assert config["runcmd"][-1] == ["systemctl", "start", "--no-block", "nodebake-first-boot.service"]
    assert config["runcmd"][-2] == ["sync"], "on the disk before anything relies on it"


def test_what_a_power_cut_emptied_is_made_once_more(tmp_path: Path) -> None:
    ((shell, option, again),) = user_data(samples.ha())["bootcmd"]
    made = {
        "/var/lib/nodebake/first-boot": {"write_files", "runcmd", "scripts_user"},
        "/etc/systemd/system/nodebake-first-boot.service": {"write_files", "runcmd", "scripts_user"},
        "/etc/ssh/ssh_host_ed25519_key": {"ssh"},
        "/etc/sudoers.d/90-cloud-init-users": {"users_groups"},
        "/home/admin/.ssh/authorized_keys": {"users_groups"},
    }
    done = tmp_path / "var/lib/cloud/instance/sem"
    done.mkdir(parents=True)
    for path in made:
        (tmp_path / path[1:]).parent.mkdir(parents=True, exist_ok=True)
    for emptied in (None, *made):
        for path in made:
            (tmp_path / path[1:]).write_text("" if path == emptied else "whole")
        modules = {"locale", *(module for each in made.values() for module in each)}
        for module in modules:
            (done / f"config_{module}").touch()
        below = re.sub(r"(?<= )/", f"{tmp_path}/", again)
        subprocess.run([shell, "-eu", option, below], check=True)
        left = {path.name.removeprefix("config_") for path in done.iterdir()}
        assert modules - left == made.get(emptied or "", set()), emptied


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    files = {file["path"]: file["content"] for file in user_data(samples.ha())["write_files"]}
    unit = tmp_path / "nodebake-first-boot.service"
    unit.write_text(files["/etc/systemd/system/nodebake-first-boot.service"])
    told = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert [line for line in told.stderr.splitlines() if unit.name in line] == []


def test_baked_host_keys_are_not_deleted() -> None:
    assert user_data(samples.ha(bake_ssh_host_keys=True))["ssh_deletekeys"] is False


def test_time_servers_are_set_without_a_package_manager() -> None:
    config = user_data(samples.ha(ntp=("10.0.0.1", "10.0.0.2")))
    files = {file["path"]: file["content"] for file in config["write_files"]}
    assert "NTP=10.0.0.1 10.0.0.2\n" in files["/etc/systemd/timesyncd.conf.d/50-cluster.conf"]
    assert "ntp" not in config and "packages" not in config


def test_there_is_no_secret_in_user_data(tmp_path: Path) -> None:
    cluster = samples.ha(bake_ssh_host_keys=True)
    minted = artifacts.secrets(tmp_path, cluster)
    text = b"".join(
        [
            seed.user_data(cluster, cluster.control_planes[0]),
            seed.meta_data(cluster.control_planes[0], "ab" * 32),
            seed.network_config(cluster, cluster.control_planes[0]),
        ]
    )
    assert b"PRIVATE KEY" not in text
    for token in minted.tokens.values():
        assert token.secret.encode() not in text


def test_cloud_inits_own_schema_is_satisfied(tmp_path: Path) -> None:
    if shutil.which("cloud-init") is None:
        pytest.skip("cloud-init is not installed")
    version = subprocess.run(["cloud-init", "--version"], capture_output=True, text=True)
    config = user_data(samples.ha(ntp=("10.0.0.1",)))
    if int((version.stdout + version.stderr).split()[-1].split(".")[0]) < 23:
        del config["locale"]  # its schema did not know `locale: false` yet, though its code did
    path = tmp_path / "user-data"
    path.write_text("#cloud-config\n" + yaml.safe_dump(config))
    done = subprocess.run(["cloud-init", "schema", "--config-file", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# -- meta-data and network-config -------------------------------------------------------------------------------------


def test_the_instance_changes_with_the_artifact() -> None:
    node = samples.ha().workers[0]
    one, other = (yaml.safe_load(seed.meta_data(node, digest * 32)) for digest in ("ab", "cd"))
    assert one == {"instance-id": "worker-1-abababababababab", "local-hostname": "worker-1"}
    assert other["instance-id"] != one["instance-id"]


def test_a_card_matched_by_mac_without_a_default_route() -> None:
    cluster = samples.ha()
    config = network(cluster, cluster.workers[0])
    card = config["ethernets"]["nic0"]
    assert card["match"] == {"macaddress": "52:54:00:00:10:15"} and card["set-name"] == "nic0"
    assert card["addresses"] == ["192.168.10.21/24"] and card["dhcp4"] is False and card["link-local"] == []
    assert card["routes"] == [{"to": "10.96.0.0/16", "via": "192.168.10.11"}], "a neighbour: cloud-init knows no scope"


def test_a_card_matched_by_name() -> None:
    cluster, node = with_network(Network((Link("ens3"),), (samples.address("10.1.1.1/24"),)))
    assert "match" not in network(cluster, node)["ethernets"]["ens3"]


def test_a_machine_without_a_kubelet_needs_no_service_route() -> None:
    cluster = samples.external_etcd()
    assert "routes" not in network(cluster, cluster.etcd_members[0])["ethernets"]["nic0"]


def test_bond_and_vlan_carry_the_addresses() -> None:
    cluster, node = with_network(BONDED)
    config = network(cluster, node)
    assert set(config["ethernets"]) == {"nic0", "nic1"}
    assert "addresses" not in config["ethernets"]["nic0"] and config["ethernets"]["nic1"]["mtu"] == 9000
    bond = config["bonds"]["bond0"]
    assert bond["interfaces"] == ["nic0", "nic1"] and bond["parameters"]["mode"] == "802.3ad"
    vlan = config["vlans"]["vlan120"]
    assert (vlan["id"], vlan["link"]) == (120, "bond0")
    assert vlan["addresses"] == ["192.168.10.21/24", "192.168.11.21/24"]
    assert vlan["routes"] == [{"to": "0.0.0.0/0", "via": "192.168.10.1"}]
    assert vlan["nameservers"] == {"addresses": ["192.168.10.2"], "search": ["example.org"]}


RENDER = """
import json, sys, tempfile
from cloudinit.net import network_state
from cloudinit.net.{renderer} import Renderer
state = network_state.parse_net_config_data(json.load(sys.stdin), renderer=Renderer({{}}))
target = tempfile.mkdtemp(dir={folder!r})
Renderer({settings}).render_network_state(state, target=target)
"""


@pytest.mark.parametrize(("renderer", "settings"), [("networkd", "{}"), ("netplan", "{'netplan_path': 'np.yaml'}")])
def test_cloud_inits_renderers_take_it(tmp_path: Path, renderer: str, settings: str) -> None:
    system = "/usr/bin/python3"
    if not Path(system).exists() or subprocess.run([system, "-c", "import cloudinit"], capture_output=True).returncode:
        pytest.skip("cloud-init's Python modules are not installed: apt install cloud-init")
    if renderer == "networkd" and os.geteuid() != 0:
        pytest.skip("cloud-init's networkd renderer gives its files to another user, which only root may")
    cluster, node = with_network(BONDED)
    for config in (network(cluster, node), network(cluster, cluster.workers[0])):
        program = RENDER.format(renderer=renderer, folder=str(tmp_path), settings=settings)
        done = subprocess.run([system, "-c", program], input=json.dumps(config), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    made = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for expected in ("192.168.10.21/24", "52:54:00:00:20:02", "10.96.0.0/16", "bond0", "120"):
        assert expected in made, made


def test_whatever_changes_in_the_artifact_changes_the_instance(tmp_path: Path) -> None:
    cluster, worker = samples.ha(), samples.ha().workers[0]
    tarball = tmp_path / "node.tar.gz"
    tarball.write_bytes(b"tarball")

    def instance(cluster: Cluster, node: Node, sums: str) -> str:
        documents = seed.documents(cluster, node, sums=sums, sign=bytes)
        path = seed.write(documents, tarball, tmp_path / "n.iso", mtime=1).path
        out = subprocess.run(["bsdtar", "-xOf", path, "meta-data"], capture_output=True, check=True).stdout
        return str(yaml.safe_load(out)["instance-id"])

    routed = worker._replace(network=worker.network._replace(mtu=9000))
    made = [
        instance(cluster, worker, "ab" * 32),
        instance(cluster, worker, "cd" * 32),
        instance(cluster, routed, "ab" * 32),
        instance(replace(cluster, users=()), worker, "ab" * 32),
    ]
    assert len(set(made)) == 4
    assert instance(cluster, worker, "ab" * 32) == made[0]
