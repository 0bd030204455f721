"""Texts of the cluster file -> values: one small pure function per format, each raising Malformed with a remedy."""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, date, datetime, timedelta
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Network, ip_network
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import urlsplit

from recipes.kit.model import USERS, Endpoint

_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_VALUE: Final = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_QUANTITY: Final = re.compile(r"[1-9][0-9]{0,14}(\.[0-9]{1,9})?([KMGTPE]i|[kMGTPE])?")
_INTERFACE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
_INTERFACE_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._*?-]{0,14}")
_MAC: Final = re.compile(r"[0-9a-f]{2}([:-])([0-9a-f]{2}\1){4}[0-9a-f]{2}")
_SERIAL: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9 ._:/+#()-]{0,126}[A-Za-z0-9._:/+#()-])?")
_USER: Final = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_COMPONENT: Final = r"[a-z0-9]+([._-]+[a-z0-9]+)*"
_REPOSITORY: Final = re.compile(rf"{_COMPONENT}(/{_COMPONENT})*(:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?")
_SSH_KEYS: Final = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "ssh-rsa",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)
# Accounts and groups that Debian has (base-passwd, systemd, openssh, cloud images): nobody may take one over, and of a
# group's name useradd makes no account.
_SYSTEM_USERS: Final = frozenset(
    (
        *("daemon", "bin", "sys", "sync", "games", "man", "lp", "mail", "news", "uucp", "proxy", "www-data", "backup"),
        *("list", "irc", "_apt", "nobody", "sshd", "messagebus", "polkitd", "haproxy", "keepalived_script"),
        *("systemd-network", "systemd-resolve", "systemd-timesync", *USERS),
        *("adm", "tty", "disk", "kmem", "dialout", "fax", "voice", "cdrom", "floppy", "tape", "sudo", "audio", "dip"),
        *("operator", "src", "shadow", "utmp", "video", "sasl", "plugdev", "staff", "users", "nogroup"),
        *("systemd-journal", "input", "kvm", "render", "sgx", "netdev", "crontab", "_ssh"),
    )
)
# Where a volume would hide, fill or give to pods what the machine itself needs: in these, and in what these lie in.
_SYSTEM_PATHS: Final = (
    *("/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib32", "/lib64", "/libx32", "/opt/nodebake", "/proc"),
    *("/root", "/run", "/sbin", "/sys", "/tmp", "/usr"),  # noqa: S108 - nothing is written there
    *(f"/var/{name}" for name in ("backups", "cache", "local", "lock", "log", "mail", "opt", "run", "spool", "tmp")),
    *(f"/var/lib/{name}" for name in ("apt", "cloud", "cni", "containerd", "dbus", "dpkg", "etcd", "kubelet")),
    *(f"/var/lib/{name}" for name in ("kube-controller-manager", "nodebake", "polkit-1", "private", "sudo", "systemd")),
)
# What the kernel and the pod network call theirs.
_SYSTEM_INTERFACES: Final = ("all", "default", "lo", "cni0", "flannel.1")
# Of build/, where each cluster has a folder of its name.
BUILD_FOLDERS: Final = ("apt", "bench", "downloads", "lab", "tests", "unpacked")
_UNUSABLE: Final = tuple(
    (IPv4Network(block), meaning)
    for block, meaning in (
        ("0.0.0.0/8", "'this network'"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)
LONGEST: Final = timedelta(days=36_500)


class Malformed(ValueError):
    """what continues "<key>: ..."; remedy is an imperative."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


def name(text: str) -> str:
    """An RFC 1123 label that resolvers and /etc/hosts take for a name."""
    if not _LABEL.fullmatch(text):
        remedy = "Use lower-case letters, digits and '-', not first or last, at most 63 characters."
        raise Malformed(f"{_shown(text)} is not an RFC 1123 label", remedy)
    if text.isdigit():
        raise Malformed(f"{text} is all digits, which programs take for an address", "Put a letter in front.")
    if text in ("localhost", "ip6-localhost", "ip6-loopback"):
        raise Malformed(f"{text} is a reserved name", "Choose another one.")
    return text


def cluster_name(text: str) -> str:
    """A name, and a folder below build/ that nothing else uses."""
    if name(text) in BUILD_FOLDERS:
        raise Malformed(f"build/{text} is not for a cluster, it has another use", "Choose another name.")
    return text


def dns_name(text: str) -> str:
    """An RFC 1123 subdomain: labels with dots between them, lower case, at most 253 characters."""
    labels = text.split(".")
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        remedy = "Use lower-case labels of letters, digits and '-', with dots between them."
        raise Malformed(f"{_shown(text)} is not a DNS name", remedy)
    if labels[-1].isdigit():
        raise Malformed(f"{text} is neither a DNS name nor an IPv4 address", "Correct it.")
    return text


def address(text: str) -> IPv4Address:
    """An IPv4 address that a machine can have."""
    _refuse_ipv6(text)
    try:
        made = IPv4Address(text)
    except ValueError:
        remedy = "Write four numbers of 0 to 255 with dots between them, as 192.168.10.11."
        if "/" in text:
            remedy = f"Write the address alone ({text.split('/')[0]}); the prefix comes from subnet."
        raise Malformed(f"{_shown(text)} is not an IPv4 address", remedy) from None
    _refuse_unusable(IPv4Network(made), text)
    return made


def subnet(text: str) -> IPv4Network:
    _refuse_ipv6(text)
    if "/" not in text:
        raise Malformed(f"{_shown(text)} has no prefix length", "Write it as 10.244.0.0/16.")
    try:
        made = IPv4Network(text)
    except ValueError:
        try:
            meant = IPv4Network(text, strict=False)
        except ValueError:
            raise Malformed(f"{_shown(text)} is not an IPv4 network", "Write it as 10.244.0.0/16.") from None
        raise Malformed(f"{text} has bits set behind its prefix", f"Write {meant}.") from None
    if text.partition("/")[2] != str(made.prefixlen):
        raise Malformed(f"{_shown(text)} is written with a mask", f"Write {made}.")
    _refuse_unusable(made, text)
    return made


def interface(text: str) -> IPv4Interface:
    """An address with its prefix: 10.20.0.11/24."""
    host, slash, prefix = text.partition("/")
    made = address(host)
    if not slash or not re.fullmatch(r"[1-9]|[12][0-9]|3[0-2]", prefix):
        raise Malformed(f"{_shown(text)} has no prefix length", f"Write it as {host}/24.")
    return IPv4Interface((made, int(prefix)))


def host(text: str) -> str:
    """An IPv4 address or a DNS name."""
    _refuse_ipv6(text)
    return str(address(text)) if re.fullmatch(r"[0-9.]+", text) else dns_name(text)


def subject_name(text: str) -> str:
    """What may be a certificate's SAN: a host, or a DNS name with * as its first label."""
    return f"*.{dns_name(text[2:])}" if text.startswith("*.") else host(text)


def endpoint(text: str) -> Endpoint:
    """host or host:port; the port is 6443 where none is given."""
    if "://" in text:
        raise Malformed(f"{_shown(text)} is a URL", "Write host:port alone.")
    _refuse_ipv6(text)
    where, colon, port = text.partition(":")
    return Endpoint(host(where), _port(port, text)) if colon else Endpoint(host(where))


def upstream(text: str) -> str:
    """A DNS server: address or address:port."""
    where, colon, port = text.partition(":")
    return f"{address(where)}:{_port(port, text)}" if colon and text.count(":") == 1 else str(address(text))


def mac(text: str) -> str:
    """A unicast MAC address, in lower case with colons."""
    lower = text.lower()
    if not _MAC.fullmatch(lower):
        raise Malformed(f"{_shown(text)} is not a MAC address", 'Write it as "52:54:00:00:10:11", in quotes.')
    made = lower.replace("-", ":")
    if int(made[:2], 16) & 1 or made == "00:00:00:00:00:00":
        raise Malformed(f"{text} is no machine's MAC address (multicast or zero)", "Read it off the machine again.")
    return made


def interface_name(text: str) -> str:
    """A network interface's name, or a pattern with * and ? for machines with one NIC."""
    if text in _SYSTEM_INTERFACES or not _INTERFACE_PATTERN.fullmatch(text):
        raise Malformed(f"{_shown(text)} is not an interface name", "Write it as eno1 (at most 15 characters).")
    return text


def link_name(text: str) -> str:
    """A network interface's name, and no pattern."""
    if text in _SYSTEM_INTERFACES or not _INTERFACE.fullmatch(text):
        raise Malformed(f"{_shown(text)} is not one interface's name", "Write it as eno1 (at most 15 characters).")
    return text


def serial(text: str) -> str:
    """A DMI serial number, as `dmidecode -s system-serial-number` prints it."""
    if not _SERIAL.fullmatch(text):
        raise Malformed(f"{_shown(text)} is not a serial number", "Use letters, digits, spaces and ._:/+#()-.")
    return text


def install_by(text: str) -> datetime | timedelta:
    """The end of a day (UTC), or a duration."""
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        try:
            day = date.fromisoformat(text)
        except ValueError:
            raise Malformed(f"{text} is not in the calendar", "Write a date as 2027-02-01.") from None
        return datetime(day.year, day.month, day.day, 23, 59, 59, tzinfo=UTC)
    try:
        return duration(text)
    except Malformed:
        remedy = "Write a date (2027-02-01), or days or weeks from minting (90d, 12w)."
        raise Malformed(f"{_shown(text)} is neither a date nor a duration", remedy) from None


def duration(text: str) -> timedelta:
    """Days or weeks: 90d, 12w."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})([dw])", text)
    if not match:
        raise Malformed(f"{_shown(text)} is not a duration", "Write days or weeks, as 365d or 52w.")
    made = timedelta(days=int(match[1]) * (7 if match[2] == "w" else 1))
    if made > LONGEST:
        raise Malformed(f"{text} is longer than a century", f"Write at most {LONGEST.days}d.")
    return made


def label_key(text: str) -> str:
    """A Kubernetes label key that a kubelet may set on its own Node (kubernetes-flags: --node-labels)."""
    prefix, slash, word = text.rpartition("/")
    _qualified(text)
    if not slash:
        return text
    if prefix == "kubernetes.io" and word in ("hostname", "os", "arch"):
        raise Malformed(f"The kubelet sets {text} itself", "Remove it.")
    allowed = (
        any(prefix == own or prefix.endswith(f".{own}") for own in ("node.kubernetes.io", "kubelet.kubernetes.io"))
        or text in ("topology.kubernetes.io/zone", "topology.kubernetes.io/region")
        or not any(prefix == own or prefix.endswith(f".{own}") for own in ("kubernetes.io", "k8s.io"))
    )
    if not allowed:
        remedy = "Use a prefix of your own, node.kubernetes.io/ or topology.kubernetes.io/zone and /region."
        if prefix == "node-restriction.kubernetes.io":
            remedy = "Use `storage`, which becomes node-restriction.kubernetes.io/storage, or a prefix of your own."
        raise Malformed(f"A kubelet may not set {text}", remedy)
    return text


def label_value(text: str) -> str:
    if not _LABEL_VALUE.fullmatch(text):
        remedy = "Use letters, digits, '-', '_' and '.', a letter or digit first and last, at most 63 characters."
        raise Malformed(f"{_shown(text)} is not a label's value", remedy)
    return text


def taint(text: str) -> str:
    """key=value:Effect or key:Effect -> key=value:Effect."""
    subject, colon, effect = text.rpartition(":")
    key, _, value = subject.partition("=")
    if not colon or effect not in ("NoSchedule", "PreferNoSchedule", "NoExecute"):
        remedy = "Write key=value:Effect, the effect being NoSchedule, PreferNoSchedule or NoExecute."
        raise Malformed(f"{_shown(text)} is not a taint", remedy)
    _qualified(key)
    label_value(value)
    if key.startswith("node.kubernetes.io/"):
        raise Malformed(f"Kubernetes itself sets the taints {key.split('/')[0]}/*", "Use a prefix of your own.")
    return f"{key}={value}:{effect}"


def quantity(text: str) -> str:
    if not _QUANTITY.fullmatch(text):
        raise Malformed(f"{_shown(text)} is not a size", "Write it as 100Gi or 500G.")
    return text


def mount_path(text: str) -> str:
    """An absolute, normal path on the machine where a volume may lie."""
    if not re.fullmatch(r"(/[A-Za-z0-9._-]+)+", text) or str(PurePosixPath(text)) != text or ".." in text.split("/"):
        remedy = "Write it as /srv/data: absolute, of letters, digits and ._-, without '..' or a '/' at the end."
        raise Malformed(f"{_shown(text)} is not a path for a volume", remedy)
    if len(text) > 1024 or any(len(name) > 255 for name in text.split("/")):
        raise Malformed(f"{_shown(text)} is longer than a path can be", "Use a path as /srv/data.")
    for own in _SYSTEM_PATHS:
        if text == own or text.startswith(f"{own}/"):
            raise Malformed(f"{text} lies in {own}, which belongs to the machine", "Use a path as /srv/data.")
        if own.startswith(f"{text}/"):
            raise Malformed(f"In {text} lies {own}, which belongs to the machine", "Use a path as /srv/data.")
    return text


def user_name(text: str) -> str:
    if not _USER.fullmatch(text):
        remedy = "Use lower-case letters, digits, '-' and '_', a letter first, at most 32 characters."
        raise Malformed(f"{_shown(text)} is not a POSIX user name", remedy)
    if text in _SYSTEM_USERS:
        raise Malformed(f"{text} is an account or a group of the system", "Choose another name, as admin.")
    return text


def ssh_key(text: str) -> str:
    """One line of authorized_keys, without options; the type inside of the key is compared."""
    kind, _, rest = text.partition(" ")
    if "PRIVATE KEY" in text:
        raise Malformed("This is a private key", "Give the public one (the .pub file), and make a new pair.")
    if kind not in _SSH_KEYS:
        remedy = f"Give one line of a .pub file, beginning with {', '.join(_SSH_KEYS[:4])} or ssh-rsa."
        raise Malformed(f"{_shown(text)} is not an SSH public key", remedy)
    try:
        blob = base64.b64decode(rest.partition(" ")[0], validate=True)
    except (binascii.Error, ValueError):
        blob = b""
    parts: list[bytes] = []
    while len(blob) >= 4:
        length = int.from_bytes(blob[:4])
        if len(blob) < 4 + length:
            break
        parts.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    if blob or len(parts) < 2 or parts[0] != kind.encode() or (kind == "ssh-ed25519" and len(parts[1]) != 32):
        raise Malformed(f"This {kind} key is cut off or damaged", "Copy the whole line of the .pub file.")
    return text


def url(text: str) -> str:
    """An http(s) URL without credentials, which would end in logs and manifests."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        good, parts = False, urlsplit("")
    if not good or not re.fullmatch(r"[!-~]+", text) or re.search(r"[\"'<>\\^`{|}#?$]", text):
        raise Malformed(f"{_shown(text)} is not a URL", "Write it as https://mirror.example.internal/path.")
    if "@" in parts.netloc:
        raise Malformed("The URL holds credentials", "Take them out; for a registry use username and passwordFile.")
    host(parts.hostname or "")
    return text


def payload_server(text: str) -> str:
    """The URL of an HTTP server's folder, or a repository of a registry as OCI's distribution specification names it:
    oci://host[:port]/repository, or oci+http://... without TLS."""
    scheme, colon, rest = text.partition("://")
    if not colon or scheme not in ("oci", "oci+http"):
        return url(text)
    where, _, repository = rest.partition("/")
    if not re.fullmatch(rf"{_COMPONENT}(/{_COMPONENT})*", repository) or len(repository) > 255:
        remedy = "Write it as oci://registry.example.internal:5000/nodebake, in small letters and without a tag."
        raise Malformed(f"{_shown(text)} names no repository of a registry", remedy)
    return f"{scheme}://{registry_host(where)}/{repository}"


def registry_host(text: str) -> str:
    """host or host:port, as image references begin with it."""
    if "/" in text:
        raise Malformed(f"{_shown(text)} is not a registry's host", "Write host or host:port alone.")
    where, colon, port = text.partition(":")
    return f"{host(where)}:{_port(port, text)}" if colon else host(where)


def registry_user(text: str) -> str:
    """A user name of HTTP's Basic authentication (RFC 7617), which ends at the first colon."""
    if ":" in text or not text.isprintable() or not text.strip():
        remedy = "Give the name alone; the password stands in passwordFile."
        raise Malformed(f"{_shown(text)} is no user name of a registry", remedy)
    return text


def image_reference(text: str) -> str:
    """registry/repository[:tag]@sha256:..., the only form that always means the same bytes."""
    subject, at, digest = text.partition("@")
    domain, slash, _ = subject.partition("/")
    if not at:
        remedy = "Name a file that exists (relative to the cluster file), or a reference by digest: name@sha256:...."
        raise Malformed(f"{_shown(text)} is neither an archive that exists nor a reference by digest", remedy)
    if not _DIGEST.fullmatch(digest):
        raise Malformed(f"{_shown(digest)} is not a digest", "Write sha256: and 64 hexadecimal digits.")
    if not slash or not ("." in domain or ":" in domain):
        raise Malformed(f"{_shown(subject)} names no registry", f"Write it out, as docker.io/library/{subject}@....")
    return image_name(text)


def image_name(text: str) -> str:
    """registry/repository with a tag or a digest or both, as containerd files an image."""
    subject, at, digest = text.partition("@")
    domain, _, repository = subject.partition("/")
    registry_host(domain)
    if not _REPOSITORY.fullmatch(repository) or (at and not _DIGEST.fullmatch(digest)):
        raise Malformed(f"{_shown(repository)} is not an image's name", "Write it in lower case, as team/app:1.0.")
    return text


def sha256(text: str) -> str:
    """As sha256sum prints it."""
    if not _DIGEST.fullmatch(f"sha256:{text}"):
        raise Malformed(f"{_shown(text)} is not a SHA-256", "Write 64 hexadecimal digits, as sha256sum prints them.")
    return text


def _qualified(key: str) -> None:
    prefix, slash, word = key.rpartition("/")
    if slash:
        dns_name(prefix)
    if not word or not _LABEL_VALUE.fullmatch(word):
        remedy = "Write [prefix/]name; the name has letters, digits, '-', '_' and '.', at most 63 characters."
        raise Malformed(f"{_shown(key)} is not a Kubernetes key", remedy)


def _port(text: str, whole: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text) or int(text) > 65535:
        raise Malformed(f"{_shown(whole)} has no valid port", "Write host:port, the port being 1 to 65535.")
    return int(text)


def _refuse_ipv6(text: str) -> None:
    if text.count(":") < 2:
        return
    try:
        network = ip_network(text.strip("[]"), strict=False)
    except ValueError:
        bracketed = re.match(r"\[([0-9A-Fa-f:.]+)\]", text)
        if not bracketed:
            return
        network = IPv6Network("::/0")
    if isinstance(network, IPv6Network):
        raise Malformed(f"{_shown(text)} is IPv6, which is not supported yet", "Use IPv4.")


def _refuse_unusable(network: IPv4Network, text: str) -> None:
    for block, meaning in _UNUSABLE:
        if network.overlaps(block):
            raise Malformed(f"{text} lies in {block}, which is {meaning}", "Use addresses of your own network.")


def _shown(text: str) -> str:
    """The text in quotes, short enough for one line."""
    return f'"{text}"' if len(text) <= 60 else f'"{text[:57]}..."'
