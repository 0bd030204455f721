"""The cluster file's shape: its keys, their types and forms; and how to read one with the place of every mistake.

Rules between keys are the inventory's. Field descriptions are the source of the JSON Schema for editors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails, PydanticCustomError

from recipes.kit import formats, places
from recipes.kit.errors import BakeError, Place
from recipes.kit.model import Approval, Arch, Endpoint, KeyType, Media, Role
from recipes.kit.places import Broken, Leaf, Odd, Row, Table, Tree

MAX_WORKERS: Final = 5000  # what Kubernetes is tested to; counted are the machines that run workloads
REFERENCE: Final = "recipes/clusters/README.md"


def _text(parse: Callable[[str], Any], **schema: Any) -> tuple[PlainValidator, WithJsonSchema]:
    """A format of formats.py as a pydantic type: text alone is taken."""

    def check(value: Any) -> Any:
        if not isinstance(value, str):
            raise PydanticCustomError("string_type", "text is meant")
        return parse(value)

    return PlainValidator(check), WithJsonSchema({"type": "string", **schema})


def _install_by(value: Any) -> datetime | timedelta:
    if isinstance(value, Odd) and value.meaning == "a date":  # the one place where a date is meant
        value = value.raw
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "text is meant")
    return formats.install_by(value)


def _off(value: Any) -> Any:
    """`swap: off` can mean one thing only, so YAML 1.1's other reading of it is no trap here."""
    return value.raw if isinstance(value, Odd) and value.raw == "off" else value


def _not_empty(text: str) -> str:
    if not text.strip():
        raise formats.Malformed("is empty", "Give it a value, or remove it.")
    return text


_DURATION_PATTERN: Final = "^[1-9][0-9]*[dw]$"
_DATE_OR_DURATION: Final = "^([0-9]{4}-[0-9]{2}-[0-9]{2}|[1-9][0-9]*[dw])$"

Name = Annotated[str, *_text(formats.name, maxLength=63, pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
ClusterName = Annotated[
    str,
    *_text(
        formats.cluster_name,
        maxLength=63,
        pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        **{"not": {"enum": list(formats.BUILD_FOLDERS)}},
    ),
]
DnsName = Annotated[str, *_text(formats.dns_name, maxLength=253)]
Host = Annotated[str, *_text(formats.host)]
SubjectName = Annotated[str, *_text(formats.subject_name)]
Address = Annotated[IPv4Address, *_text(formats.address, format="ipv4")]
Subnet = Annotated[IPv4Network, *_text(formats.subnet, examples=["192.168.10.0/24"])]
Interface = Annotated[IPv4Interface, *_text(formats.interface, examples=["10.20.0.11/24"])]
ControlPlaneEndpoint = Annotated[Endpoint, *_text(formats.endpoint, examples=["api.example.internal:6443"])]
Upstream = Annotated[str, *_text(formats.upstream, examples=["192.168.10.2", "192.168.10.2:5353"])]
Mac = Annotated[str, *_text(formats.mac, pattern="^([0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}$")]
InterfaceName = Annotated[str, *_text(formats.interface_name, maxLength=15, examples=["eno1", "e*"])]
LinkName = Annotated[str, *_text(formats.link_name, maxLength=15, examples=["eno1"])]
Serial = Annotated[str, *_text(formats.serial, maxLength=128)]
Duration = Annotated[timedelta, *_text(formats.duration, pattern=_DURATION_PATTERN)]
LabelKey = Annotated[str, *_text(formats.label_key)]
LabelValue = Annotated[str, *_text(formats.label_value, maxLength=63)]
Taint = Annotated[str, *_text(formats.taint, examples=["dedicated=storage:NoSchedule"])]
Quantity = Annotated[str, *_text(formats.quantity, examples=["100Gi"])]
MountPath = Annotated[str, *_text(formats.mount_path, examples=["/srv/data"])]
UserName = Annotated[str, *_text(formats.user_name, maxLength=32)]
SshKey = Annotated[str, *_text(formats.ssh_key)]
Url = Annotated[str, *_text(formats.url, format="uri")]
PayloadServer = Annotated[
    str,
    *_text(formats.payload_server, examples=["http://192.168.10.2:8080", "oci://registry.example.internal/nodebake"]),
]
RegistryHost = Annotated[str, *_text(formats.registry_host, examples=["registry.example.internal:5000"])]
RegistryUser = Annotated[str, *_text(formats.registry_user)]
Sha256 = Annotated[str, *_text(formats.sha256, pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, *_text(_not_empty)]
InstallBy = Annotated[
    datetime | timedelta,
    PlainValidator(_install_by),
    WithJsonSchema({"type": "string", "pattern": _DATE_OR_DURATION, "examples": ["90d", "12w", "2027-02-01"]}),
]
BondMode = Literal["802.3ad", "active-backup", "balance-alb", "balance-rr", "balance-tlb", "balance-xor", "broadcast"]


class Shape(BaseModel):
    """Every mapping of the cluster file: camelCase keys, no unknown ones, no conversion between types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, alias_generator=to_camel, hide_input_in_errors=True
    )


class Networking(Shape):
    pod_subnet: Subnet = Field(default=IPv4Network("10.244.0.0/16"), description="Network of the pods")
    service_subnet: Subnet = Field(
        default=IPv4Network("10.96.0.0/16"), description="Network of the Services' ClusterIPs"
    )
    dns_domain: DnsName = Field(default="cluster.local", description="The cluster's own DNS domain")
    node_cidr_mask_size: int = Field(
        default=24,
        alias="nodeCIDRMaskSize",
        ge=16,
        le=28,
        description="Prefix length of the pod network that each node gets",
    )


class LinkShape(Shape):
    name: LinkName = Field(description="Name of the network interface card")
    mac: Mac | None = Field(
        default=None, description="Its MAC address, in quotes; without one the card is matched by name"
    )


class Wiring(Shape):
    """How machines are wired; a node's or pool's own keys win over machineNetwork's."""

    subnet: Subnet | None = Field(default=None, description="The machines' own network")
    gateway: Address | None = Field(default=None, description="Default route; without one there is none")
    nameservers: list[Address] | None = Field(default=None, description="DNS servers of the machines")
    search: list[DnsName] | None = Field(default=None, description="DNS search domains of the machines")
    mtu: int | None = Field(default=None, ge=1280, le=9216, description="MTU in bytes")
    vlan: int | None = Field(default=None, ge=1, le=4094, description="Tagged VLAN that carries the addresses")
    interface: InterfaceName | None = Field(
        default=None, description="The network card's name, or a pattern (e*) for machines that have one card only"
    )
    links: list[LinkShape] | None = Field(
        default=None, min_length=1, description="Network cards, two or more for a bond"
    )
    bond: BondMode | None = Field(default=None, description="Bonding mode of the links")


class MachineNetwork(Wiring):
    ntp: list[Host] = Field(default=[], description="Time servers of the machines")


class ApiServer(Shape):
    cert_sans: list[SubjectName] = Field(default=[], alias="certSANs", description="More names of the API servers")


class Volume(Shape):
    name: Name = Field(description="The PersistentVolume is called <node>-<name>")
    path: MountPath = Field(description="Directory or mount point on the machine")
    size: Quantity = Field(description="Its capacity, a Kubernetes quantity")
    storage_class: DnsName | None = Field(
        default=None, description="One of storageClasses; may be left out when there is one"
    )


class Machine(Wiring):
    """What a node and a pool have in common."""

    name: Name = Field(description="Name of the node (RFC 1123 label); of a pool: nodes are <name>-1 and so on")
    role: Role = Field(description="What the machine is")
    arch: Arch | None = Field(default=None, description="Processor architecture, if not the cluster's")
    media: Media | None = Field(default=None, description="full or thin seeds, if not the cluster's")
    storage: LabelValue | None = Field(
        default=None, description="Value of the label node-restriction.kubernetes.io/storage"
    )
    labels: dict[LabelKey, LabelValue] = Field(default={}, description="Node labels that the kubelet sets")
    taints: list[Taint] | None = Field(
        default=None, description="key=value:Effect; replaces the taint of a control plane"
    )
    volumes: list[Volume] = Field(default=[], description="Local PersistentVolumes")


class NodeShape(Machine):
    address: Address = Field(description="The machine's address in subnet")
    extra_addresses: list[Interface] = Field(
        default=[], description="More addresses on the same card, with their prefix"
    )
    mac: Mac | None = Field(default=None, description="MAC address of its one network card, in quotes")
    serial: Serial | None = Field(default=None, description="DMI serial number, checked at first boot")
    denied: bool = Field(
        default=False, description="true: API servers refuse this machine, and it gets no certificate any more"
    )


class Pool(Machine):
    count: int = Field(ge=1, le=MAX_WORKERS, description="How many machines")
    first_address: Address = Field(description="Address of the first; the others follow without a gap")
    macs: list[Mac] | None = Field(default=None, description="MAC addresses in order, one for each machine")
    serials: list[Serial] | None = Field(default=None, description="DMI serial numbers in order, one for each machine")


class UserShape(Shape):
    name: UserName = Field(description="Login name, the same on every machine")
    ssh_authorized_keys: list[SshKey] = Field(min_length=1, description="Public keys, one line each")


class RegistryShape(Shape):
    host: RegistryHost = Field(description="Registry as image references name it")
    mirrors: list[Url] = Field(default=[], description="URLs tried in order before the registry itself")
    ca: Text | None = Field(default=None, description="PEM file of the CA that signed its certificate")
    username: RegistryUser | None = Field(default=None, description="User to pull as")
    password_file: Text | None = Field(default=None, description="File with the password in its first line")


class BaseImageShape(Shape):
    image: Text = Field(description="Raw disk image with a GPT: a file, or a URL")
    arch: Arch | None = Field(default=None, description="Its processor architecture, if not the cluster's")
    sha256: Sha256 | None = Field(default=None, description="Its SHA-256; needed with a URL")


class ValidityShape(Shape):
    ca: Duration = Field(default=timedelta(days=3652), description="CA certificates")
    leaf: Duration = Field(
        default=timedelta(days=1096), description="Baked certificates, which nothing renews on the machine"
    )
    kubelet: Duration = Field(default=timedelta(days=365), description="Kubelets' own certificates, which rotate")


class ClusterFile(Shape):
    """A cluster, as the operator writes it."""

    name: ClusterName = Field(description="Name of the cluster (RFC 1123 label)")
    install_by: InstallBy = Field(
        default=timedelta(days=90), description="Until when machines may join: a date, or days or weeks from minting"
    )
    networking: Networking = Field(default_factory=Networking, description="Networks inside of the cluster")
    control_plane_endpoint: ControlPlaneEndpoint | None = Field(
        default=None, description="host:port under which the API servers are reached from outside"
    )
    api_server: ApiServer = Field(default_factory=ApiServer, description="Settings of the API servers")
    machine_network: MachineNetwork = Field(
        default_factory=MachineNetwork, description="Wiring that all machines share"
    )
    etcd: Literal["stacked", "external"] = Field(
        default="stacked", description="stacked: on the control planes; external: on machines of the role etcd"
    )
    load_balancer: Literal["local", "nodes", "external"] = Field(
        default="local", description="local: on each worker; nodes: machines of the role load-balancer; external: yours"
    )
    virtual_ip: Address | None = Field(
        default=None,
        alias="virtualIP",
        description="Address that keepalived holds on load balancers, or on control planes",
    )
    nodes: list[NodeShape] = Field(default=[], description="Machines, one by one")
    pools: list[Pool] = Field(default=[], description="Machines that differ in name and address only")
    users: list[UserShape] = Field(default=[], description="Administrators on every machine")
    arch: Arch = Field(default="amd64", description="Processor architecture")
    media: Media = Field(default="full", description="full: a seed carries all; thin: the payload comes from elsewhere")
    payload_server: PayloadServer | None = Field(
        default=None,
        description="Where machines with thin media fetch the payload: the URL of build/<cluster>/payloads, or a"
        " registry's repository",
    )
    pod_network: Literal["flannel", "none"] = Field(
        default="flannel", description="none: a pod network of your own, by extraObjects"
    )
    flannel_backend: Literal["vxlan", "host-gw"] = Field(
        default="vxlan", description="host-gw: without encapsulation, for machines in one network"
    )
    max_pods: int = Field(default=100, ge=1, le=1000, description="Pods on one node")
    dns_upstream: list[Upstream] = Field(
        default=[], description="Where CoreDNS forwards other names; nowhere without it"
    )
    key_type: KeyType = Field(default="ecdsa-p256", description="Type of the minted keys")
    validity: ValidityShape = Field(
        default_factory=ValidityShape, description="Certificates' lifetimes, in days or weeks"
    )
    encryption_keys: list[Annotated[int, Field(ge=1, le=999)]] = Field(
        default=[1],
        min_length=1,
        description="Keys of Secrets in etcd, by number: the first writes, all read",
    )
    approval: Approval = Field(
        default="inventory", description="inventory: what was baked is approved; group: whoever holds a token"
    )
    denied: list[Name] = Field(
        default=[], description="Machines that API servers refuse, and that get no certificate any more"
    )
    swap: Annotated[Literal["refuse", "off"], BeforeValidator(_off)] = Field(
        default="refuse", description="What first boot does on a machine with swap: refuse, or turn it off"
    )
    ssh_host_keys: Literal["machine", "baked"] = Field(
        default="machine", description="machine: made there, shown on its console; baked: with a known_hosts"
    )
    packages: Literal["current", "locked"] = Field(
        default="current", description="locked: a locked Debian package that the mirror no longer has is an error"
    )
    debian_mirror: Url | None = Field(default=None, description="Debian mirror instead of the desk's own")
    base_images: list[BaseImageShape] = Field(
        default=[], description="What disk images begin with, one an architecture; without, made of Debian packages"
    )
    images: list[Text] = Field(default=[], description="Images for your workloads: archives, or references by digest")
    registries: list[RegistryShape] = Field(default=[], description="Registries that your workloads pull from")
    storage_classes: list[DnsName] = Field(default=[], description="StorageClasses for local volumes")
    extra_objects: list[Text] = Field(default=[], description="Manifests of your own that the cluster applies")


@dataclass(frozen=True, slots=True)
class Document:
    """A cluster file as read: its shape (None: too broken for one), and where everything in it stands.

    What was a mistake has been taken out of shape and tree, so that the rest can still be looked at.
    """

    file: Path
    shape: ClusterFile | None
    tree: Tree | None
    errors: tuple[BakeError, ...]

    def place(self, *loc: str | int, key: bool = False) -> Place:
        """The place of a value, or (key=True) of its key; of what encloses it where it is not written."""
        if self.tree is None:
            return Place(self.file)
        return _place(self.file, self.tree, loc, key=key)

    def written(self, *loc: str | int) -> bool:
        """Whether the file itself has a value at loc."""
        return self.tree is not None and len(list(places.walk(self.tree, loc))) > len(loc)

    def whole(self, *loc: str | int) -> bool:
        """Whether nothing at loc was taken out: not the key itself, nor an item of the list there."""
        if self.tree is None:
            return False
        path = list(places.walk(self.tree, loc))
        if any(isinstance(at, Table) and step in at.lost for at, step in zip(path, loc, strict=False)):
            return False
        return not (len(path) > len(loc) and isinstance(path[-1], Row) and path[-1].lost)


def read(file: Path) -> Document:
    """Read a cluster file. BakeError when it cannot be read at all; mistakes in it are the Document's errors."""
    tree, errors = places.parse(file, places.read_text(file))
    if tree is None:
        if not errors:
            remedy = f"Start from one of the examples; {REFERENCE} has every key."
            errors.append(BakeError("The cluster file is empty", where=Place(file, 1, 1), remedy=remedy))
        return Document(file, None, None, tuple(errors))
    if not isinstance(tree, Table):
        found = "A list" if isinstance(tree, Row) else "Text"
        what = f"{found} stands where the cluster file's keys are meant"
        where = Place(file, tree.line, tree.column)
        errors.append(BakeError(what, where=where, remedy="Begin with name: and nodes:, at the left margin."))
        return Document(file, None, tree, tuple(errors))
    places.prune(tree)
    shape: ClusterFile | None = None
    told = False
    while shape is None:
        try:
            shape = ClusterFile.model_validate(places.plain(tree))
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)
            if not told:  # what fails later fails because a part was taken out
                errors.extend(_told(file, tree, details))
                told = True
            taken = [_take_out(tree, detail) for detail in details]
            if not all(taken):
                break
            places.prune(tree)
    return Document(file, shape, tree, tuple(errors))


def _take_out(tree: Tree, detail: ErrorDetails) -> bool:
    """Mark what is wrong as Broken; False when that would be the whole file."""
    loc = detail["loc"]
    path = list(places.walk(tree, loc))
    if detail["type"] == "missing":
        path = path[: len(loc)]
    if isinstance(tree, Table) and loc == ("name",):
        tree.items["name"] = Leaf("unnamed", "unnamed", tree.line, tree.column)  # so that the rest can be looked at
        return True
    if len(path) < 2:
        return False
    parent, step, last = path[-2], loc[len(path) - 2], path[-1]
    if isinstance(parent, Table):
        if detail["type"] == "extra_forbidden":  # nothing is missing without it
            parent.items.pop(str(step), None)
        else:
            parent.items[str(step)] = Broken(last.line, last.column)
    elif isinstance(parent, Row) and isinstance(step, int):
        parent.items[step] = Broken(last.line, last.column)
    return True


def _place(file: Path, tree: Tree, loc: tuple[str | int, ...], *, key: bool = False) -> Place:
    path = list(places.walk(tree, loc))
    at: Tree = path[-1]
    if key and len(path) == len(loc) + 1 and loc:
        parent = path[-2]
        if isinstance(parent, Table):
            at = parent.keys[str(loc[-1])]
    return Place(file, at.line, at.column)


def _told(file: Path, tree: Tree, details: list[ErrorDetails]) -> list[BakeError]:
    errors: dict[tuple[str | int, ...], BakeError] = {}
    for detail in details:
        if not _is_told(tree, detail):
            errors.setdefault(detail["loc"], _mistake(file, tree, detail))
    return list(errors.values())


def _is_told(tree: Tree, detail: ErrorDetails) -> bool:
    """Whether it is missing, or a list is empty, because what stood there was a mistake of YAML."""
    loc = detail["loc"]
    path = list(places.walk(tree, loc))
    if detail["type"] == "missing" and len(path) == len(loc):
        return isinstance(path[-1], Table) and loc[-1] in path[-1].lost
    return detail["type"] == "too_short" and isinstance(path[-1], Row) and path[-1].lost


def _mistake(file: Path, tree: Tree, detail: ErrorDetails) -> BakeError:
    """pydantic's error in the words of the cluster file."""
    loc = tuple(step for step in detail["loc"] if step != "[key]")
    kind, context = detail["type"], detail.get("ctx", {})
    key = next((step for step in reversed(loc) if isinstance(step, str)), "")
    at = list(places.walk(tree, loc))[-1]
    is_key = kind == "extra_forbidden" or "[key]" in detail["loc"]
    where = _place(file, tree, loc, key=is_key)
    if kind == "missing":
        inside = next((step for step in reversed(loc[:-1]) if isinstance(step, str)), None)
        return BakeError(
            f"{f'This entry of {inside}' if inside else 'The cluster file'} has no {key}",
            where=where,
            remedy=f"Add {key}:; {REFERENCE} has an example.",
        )
    if kind == "extra_forbidden":
        return BakeError(f"There is no key {key} here", where=where, remedy=_nearest_key(loc))
    if kind == "value_error" and isinstance(context.get("error"), formats.Malformed):
        malformed = context["error"]
        return BakeError(f"{key}: {malformed.what}", where=where, remedy=malformed.remedy)
    if isinstance(at, Leaf) and isinstance(at.value, Odd) and at.value.meaning == "nothing":
        return BakeError(f"{key} has no value", where=where, remedy="Give it a value, or remove the key.")
    what, remedy = _wanted(kind, dict(context), at)
    return BakeError(f"{key}: {what}", where=where, remedy=remedy)


def _wanted(kind: str, context: dict[str, Any], at: Tree) -> tuple[str, str]:
    """What stands there instead of what was meant, and what to write."""
    raw = at.raw if isinstance(at, Leaf) else ""
    stands = f"{raw} " if raw and len(raw) <= 60 else ""
    if isinstance(at, Table):
        found = "a mapping"
    elif isinstance(at, Row):
        found = "a list"
    elif isinstance(at, Leaf) and isinstance(at.value, Odd):
        found = f"{stands}without quotes is {at.value.meaning} to YAML readers"
    elif isinstance(at, Leaf) and isinstance(at.value, bool):
        found = f"{stands}without quotes is true or false"
    elif isinstance(at, Leaf) and isinstance(at.value, int):
        found = f"{stands}without quotes is a number"
    else:
        found = f"{stands}is text"
    leaf = isinstance(at, Leaf)

    def meant(wanted: str) -> str:
        return (
            f"{found}, and {wanted} is meant"
            if leaf
            else f"{found[0].upper()}{found[1:]} stands where {wanted} is meant"
        )

    match kind:
        case "string_type":
            return meant("text"), f'Write "{raw}", with quotes.' if leaf else "Write one value."
        case "int_type":
            number = raw.lstrip("0") or "0"
            remedy = f"Write {number}, without quotes." if number.isdigit() else "Write digits alone, as 24."
            return meant("a whole number"), remedy
        case "bool_type":
            if isinstance(at, Leaf) and isinstance(at.value, Odd) and at.value.meaning == "true or false":
                return f"{raw} is true or false to some YAML readers only", "Write true or false."
            return meant("true or false"), "Write true or false."
        case "literal_error":
            choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
            close = difflib.get_close_matches(raw, choices, n=1)
            listed = f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else "".join(choices)
            remedy = f"Did you mean {close[0]}? It may be {listed}." if close else f"Write {listed}."
            return (f'"{raw[:60]}" is not one of the choices' if leaf else meant("one word")), remedy
        case "list_type":
            one_line = f"Write [{raw}], or one line for each, beginning with '- '."
            return meant("a list"), one_line if leaf else "Begin each entry with '- '."
        case "model_type" | "model_attributes_type" | "dict_type":
            return meant("a mapping"), "Write key: value lines, indented."
        case "greater_than_equal":
            return f"{stands}is less than {context['ge']}", f"Write {context['ge']} or more."
        case "less_than_equal":
            if context["le"] == MAX_WORKERS:
                limit = f"{stands}machines are more than the {MAX_WORKERS} workers that Kubernetes is tested to"
                return limit, "Divide them into several clusters."
            return f"{stands}is more than {context['le']}", f"Write {context['le']} or less."
        case "too_short":
            return "The list is empty", "Name at least one, or remove the key."
    return "This value is not allowed", f"See {REFERENCE}."


def _nearest_key(loc: tuple[str | int, ...]) -> str:
    """The remedy for an unknown key: the nearest one that exists there, by the shape's own fields."""
    model: Any = ClusterFile
    for step in loc[:-1]:
        if isinstance(step, int):
            continue
        fields = {info.alias: info.annotation for info in model.model_fields.values()}
        model = _model_in(fields.get(step)) or model
    keys = sorted(info.alias or "" for info in model.model_fields.values())
    plain = {re.sub("[-_]", "", key).lower(): key for key in keys}
    close = difflib.get_close_matches(re.sub("[-_]", "", str(loc[-1])).lower(), plain, n=1, cutoff=0.7)
    if close:
        return f"Did you mean {plain[close[0]]}?"
    return f"Remove it; there are {', '.join(keys)}."


def _model_in(annotation: Any) -> type[Shape] | None:
    """The Shape in list[Shape] | None and the like."""
    if isinstance(annotation, type) and issubclass(annotation, Shape):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)
