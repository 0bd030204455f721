"""Cluster -> the objects that every control plane applies to its API server, none of them secret.

The operator's are validated strictly against Kubernetes' schemas before they leave the desk (the cluster's own are, in
the tests): behind the air gap a mistyped field would be found only once the machines stand.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recipes.kit import emit, sizing
from recipes.kit.errors import BakeError, BakeErrors, Place
from recipes.kit.model import Cluster
from recipes.kit.overlay import word
from recipes.kit.profiles import ADMIN_GROUP

_API_VERSION = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?v[a-z0-9]{1,30}")
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9]{0,62}")
_LARGEST_DOCUMENT = 1_000_000  # values of one of the operator's documents, aliases written out
SCHEMAS = "1.37"  # Kubernetes' schemas that objects are validated against

RBAC = "rbac.authorization.k8s.io"
# The groups of Kubernetes itself: what is unknown in one of them is a mistake, elsewhere it is a CRD's.
_OF_K8S_IO = (
    *("admissionregistration", "apiextensions", "apiregistration", "authentication", "authorization", "certificates"),
    *("coordination", "discovery", "events", "flowcontrol.apiserver", "internal.apiserver", "networking", "node"),
    *("rbac.authorization", "resource", "scheduling", "storage", "storagemigration"),
)
OWN_GROUPS = frozenset(
    ("", "apps", "autoscaling", "batch", "extensions", "policy", *(f"{group}.k8s.io" for group in _OF_K8S_IO))
)
LABELS = {"app.kubernetes.io/managed-by": "nodebake"}

Object = dict[str, Any]


def rights(cluster: Cluster) -> list[Object]:
    """Who may do what: all that machines need in order to join. Applied before everything else."""
    return [*_bindings(cluster), *_controller(), *(_flannel() if cluster.pod_network == "flannel" else ())]


def static(cluster: Cluster, image: Mapping[str, str]) -> list[Object]:
    """The cluster's other objects, then the operator's, in the order in which they can be applied.

    image: name -> reference, of the images in the payload. Raises BakeErrors for mistakes in extraObjects.
    """
    return [
        *_namespaces(),
        *_priority_classes(),
        *_coredns(cluster, image["coredns"]),
        *_storage(cluster),
        *operators(cluster.extra_objects),
    ]


def document(objects: Iterable[Object]) -> bytes:
    """Objects as one YAML stream; the same objects give the same bytes."""
    return emit.documents(objects)


def json_list(objects: Sequence[Object]) -> bytes:
    """Objects as a List in JSON: nodebake-controller reads it with Python's own library, and kubectl knows JSON by its
    first character.

    No reader of YAML may be given it: JSON writes what lies beyond U+FFFF as two escapes, which are no text there.
    """
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, separators=(",", ":")).encode() + b"\n"


def encryption_configuration(keys: Mapping[int, bytes]) -> Object:
    """Secrets are encrypted before they reach etcd (XSalsa20-Poly1305); what was written in the clear stays readable.

    keys: by number, 32 bytes each; the first one writes. AES-GCM would need a new key after 200,000 writes, AES-CBC is
    not authenticated.
    """
    named = []
    for number, key in keys.items():
        if len(key) != 32:
            raise ValueError(f"secretbox takes a key of 32 bytes, not {len(key)}")
        name = "baked" if number == 1 else f"baked-{number}"
        named.append({"name": name, "secret": base64.b64encode(key).decode()})
    return {
        "apiVersion": "apiserver.config.k8s.io/v1",
        "kind": "EncryptionConfiguration",
        "resources": [
            {
                "resources": ["secrets"],
                "providers": [{"secretbox": {"keys": named}}, {"identity": {}}],
            }
        ],
    }


def invalid(candidate: Object) -> str | None:
    """Why Kubernetes would refuse this object (it has apiVersion and kind), or None. A CRD's kind is not judged."""
    import kubernetes_validate  # slow to import, and needed by a bake only

    group = candidate["apiVersion"].rpartition("/")[0]
    if group not in OWN_GROUPS:
        return None
    try:
        kubernetes_validate.validate(candidate, SCHEMAS, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        return f"it has no kind {candidate['kind']} in {candidate['apiVersion']}"
    except kubernetes_validate.ValidationError as error:
        path = ".".join(str(part) for part in error.path)
        return f"{path}: {error.message}" if path else str(error.message)
    return None


def operators(files: Iterable[Path]) -> list[Object]:
    """The operator's manifests, Lists flattened. Raises BakeErrors with every mistake and its place."""
    found: list[Object] = []
    mistakes: list[BakeError] = []
    for file in files:
        try:
            documents = _documents(file)
        except BakeError as error:
            mistakes.append(error)
            continue
        for line, content in documents:
            for candidate in _flattened(content):
                why = _shapeless(candidate) or invalid(candidate)
                if why is None:
                    found.append(candidate)
                else:
                    mistakes.append(
                        BakeError(
                            f"{_title(candidate)[:300]} is no valid object of Kubernetes {SCHEMAS}: {why[:1000]}",
                            where=Place(file, line),
                            remedy="correct the manifest",
                        )
                    )
    if mistakes:
        raise BakeErrors(mistakes)
    return found


def _object(
    api: str, kind: str, name: str, *, namespace: str | None = None, labels: Mapping[str, str] = {}, **fields: Any
) -> Object:
    metadata: Object = {"name": name, "labels": {**LABELS, **labels}}
    if namespace is not None:
        metadata["namespace"] = namespace
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **fields}


_QUIET = ("kube-node-lease", "kube-public")  # nobody runs anything there


def _namespaces() -> list[Object]:
    """What PodSecurity demands, where one looks for it; other namespaces get the API server's default, baseline."""
    level = "pod-security.kubernetes.io/"
    return [
        _object("v1", "Namespace", "kube-system", labels={f"{level}enforce": "privileged"}),
        *(_object("v1", "Namespace", name, labels={f"{level}enforce": "restricted"}) for name in _QUIET),
        _object(
            "v1",
            "Namespace",
            "default",
            labels={f"{level}enforce": "baseline", f"{level}audit": "restricted", f"{level}warn": "restricted"},
        ),
    ]


def _cluster_binding(name: str, role: str, kind: str, subject: str) -> Object:
    return _object(
        f"{RBAC}/v1",
        "ClusterRoleBinding",
        f"nodebake:{name}",
        roleRef={"apiGroup": RBAC, "kind": "ClusterRole", "name": role},
        subjects=[{"apiGroup": RBAC, "kind": kind, "name": subject}],
    )


def _bindings(cluster: Cluster) -> list[Object]:
    signing = "system:certificates.k8s.io:certificatesigningrequests"
    bindings = [
        _cluster_binding("cluster-admins", "cluster-admin", "Group", ADMIN_GROUP),
        _cluster_binding("kubelet-api", "system:kubelet-api-admin", "User", "kube-apiserver-kubelet-client"),
        _cluster_binding("node-bootstrapper", "system:node-bootstrapper", "Group", "system:bootstrappers"),
        # kube-proxy and flanneld speak as their node.
        _cluster_binding("node-proxier", "system:node-proxier", "Group", "system:nodes"),
    ]
    approvals = [
        _cluster_binding("approve-node-client", f"{signing}:nodeclient", "Group", "system:bootstrappers"),
        _cluster_binding("approve-node-client-renewal", f"{signing}:selfnodeclient", "Group", "system:nodes"),
    ]
    # Without subjects they take back what `approval: group` gave before; what is left out stays in a cluster.
    return bindings + [one if cluster.approval == "group" else {**one, "subjects": []} for one in approvals]


def _controller() -> list[Object]:
    """What nodebake-controller may do on every control plane, but for applying objects (its objects.py says how)."""
    name, namespace = "nodebake:controller", "kube-system"

    def rule(group: str, resources: str, verbs: str, **names: list[str]) -> Object:
        return {"apiGroups": [group], "resources": resources.split(), "verbs": verbs.split(), **names}

    certificates = "certificates.k8s.io"
    signers = [f"kubernetes.io/{signer}" for signer in ("kube-apiserver-client-kubelet", "kubelet-serving")]
    return [
        _object(
            f"{RBAC}/v1",
            "ClusterRole",
            name,
            rules=[
                rule(certificates, "certificatesigningrequests", "list watch"),
                rule(certificates, "certificatesigningrequests/approval", "update"),
                rule(certificates, "signers", "approve", resourceNames=signers),
                rule("", "nodes", "get list watch patch"),
            ],
        ),
        _cluster_binding("controller", name, "User", name),
        _object(
            f"{RBAC}/v1",
            "Role",
            name,
            namespace=namespace,
            rules=[
                rule("", "secrets", "get list watch create patch delete"),
                rule("", "configmaps", "get list watch", resourceNames=["nodebake-inventory"]),
            ],
        ),
        _object(
            f"{RBAC}/v1",
            "RoleBinding",
            name,
            namespace=namespace,
            roleRef={"apiGroup": RBAC, "kind": "Role", "name": name},
            subjects=[{"apiGroup": RBAC, "kind": "User", "name": name}],
        ),
    ]


def _flannel() -> list[Object]:
    """flanneld reads every Node; its own it annotates as that node, which the Node authorizer lets it do."""
    return [
        _object(
            f"{RBAC}/v1",
            "ClusterRole",
            "nodebake:flannel",
            rules=[{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]}],
        ),
        _cluster_binding("flannel", "nodebake:flannel", "Group", "system:nodes"),
    ]


def _priority_classes() -> list[Object]:
    def priority(name: str, value: int, description: str, **fields: Any) -> Object:
        return _object("scheduling.k8s.io/v1", "PriorityClass", name, value=value, description=description, **fields)

    return [
        priority("nodebake-high", 1_000_000, "Workloads that others make room for."),
        priority("nodebake-default", 1000, "What a pod has that names no class.", globalDefault=True),
        priority("nodebake-low", 100, "Workloads that wait and never displace others.", preemptionPolicy="Never"),
    ]


def _storage(cluster: Cluster) -> list[Object]:
    classes = [
        _object(
            "storage.k8s.io/v1",
            "StorageClass",
            name,
            provisioner="kubernetes.io/no-provisioner",
            # A local volume is chosen together with the node that has it.
            volumeBindingMode="WaitForFirstConsumer",
            reclaimPolicy="Retain",
        )
        for name in cluster.storage_classes
    ]
    volumes = [
        _object(
            "v1",
            "PersistentVolume",
            f"{node.name}-{volume.name}",
            spec={
                "capacity": {"storage": volume.size},
                "volumeMode": "Filesystem",
                "accessModes": ["ReadWriteOnce"],
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": volume.storage_class,
                "local": {"path": volume.path},
                "nodeAffinity": {
                    "required": {
                        "nodeSelectorTerms": [
                            {
                                "matchExpressions": [
                                    {"key": "kubernetes.io/hostname", "operator": "In", "values": [node.name]}
                                ]
                            }
                        ]
                    }
                },
            },
        )
        for node in cluster.nodes
        for volume in node.volumes
    ]
    return classes + volumes


def corefile(cluster: Cluster) -> str:
    """CoreDNS' configuration. It listens on 1053 inside of its pod, which needs no capability.

    The order of plugins is CoreDNS' own, whatever the order here: template would come before kubernetes, so what is
    beyond the cluster has a block of its own.
    """
    own = [word(cluster.dns_domain), "in-addr.arpa", "ip6.arpa"]
    upstream: list[str] = []
    # Other names do not exist: an answer at once, where REFUSED would make resolvers wait and ask again.
    beyond = ["template ANY ANY . {", "    rcode NXDOMAIN", "}"]
    if cluster.dns_upstream:
        upstream = [f"forward . {' '.join(map(word, cluster.dns_upstream))} {{", "    max_concurrent 1000", "}"]
        beyond = [*upstream, "cache 30", "loop"]
    inside = [
        "errors",
        "health :8080 {",
        "    lameduck 5s",
        "}",
        "ready :8181",
        f"kubernetes {' '.join(own)} {{",
        "    pods insecure",
        # What the cluster does not know of addresses, the upstream may.
        *(["    fallthrough in-addr.arpa ip6.arpa"] if upstream else []),
        "    ttl 30",
        "}",
        *upstream,
        "prometheus :9153",
        "cache 30",
        "reload",
        "loadbalance",
    ]
    blocks = [(" ".join(f"{zone}:1053" for zone in own), inside), (".:1053", ["errors", *beyond, "loadbalance"])]
    return (
        "\n".join("\n".join([f"{zones} {{", *(f"    {line}" for line in lines), "}"]) for zones, lines in blocks) + "\n"
    )


def _coredns(cluster: Cluster, image: str) -> list[Object]:
    name, namespace = "coredns", "kube-system"
    selector = {"k8s-app": "kube-dns"}
    several = len(cluster.kubelets) > 1
    pods = len(cluster.kubelets) * cluster.max_pods
    objects = [
        _object("v1", "ServiceAccount", name, namespace=namespace, labels=selector),
        _object(
            f"{RBAC}/v1",
            "ClusterRole",
            "nodebake:coredns",
            rules=[
                {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
            ],
        ),
        _object(
            f"{RBAC}/v1",
            "ClusterRoleBinding",
            "nodebake:coredns",
            roleRef={"apiGroup": RBAC, "kind": "ClusterRole", "name": "nodebake:coredns"},
            subjects=[{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
        ),
        _object("v1", "ConfigMap", name, namespace=namespace, labels=selector, data={"Corefile": corefile(cluster)}),
        _object(
            "apps/v1",
            "Deployment",
            name,
            namespace=namespace,
            labels=selector,
            spec={
                "replicas": sizing.dns_replicas(len(cluster.kubelets)),
                "revisionHistoryLimit": 3,
                "selector": {"matchLabels": selector},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
                "template": {"metadata": {"labels": selector}, "spec": _coredns_pod(image, selector, pods)},
            },
        ),
        _object(
            "v1",
            "Service",
            "kube-dns",
            namespace=namespace,
            labels={**selector, "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"},
            spec={
                "clusterIP": str(cluster.dns_service_address),
                "selector": selector,
                "ports": [
                    {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": "dns"},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": "dns-tcp"},
                    {"name": "metrics", "port": 9153, "protocol": "TCP", "targetPort": "metrics"},
                ],
            },
        ),
    ]
    if several:  # one replica alone would block every drain
        objects.append(
            _object(
                "policy/v1",
                "PodDisruptionBudget",
                name,
                namespace=namespace,
                labels=selector,
                spec={"maxUnavailable": 1, "selector": {"matchLabels": selector}},
            )
        )
    return objects


def _coredns_pod(image: str, selector: Mapping[str, str], pods: int) -> Object:
    def probe(path: str, port: str, **fields: int) -> Object:
        return {"httpGet": {"path": path, "port": port, "scheme": "HTTP"}, **fields}

    lost = [
        {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30}
        for state in ("not-ready", "unreachable")
    ]
    return {
        "serviceAccountName": "coredns",
        "priorityClassName": "system-cluster-critical",
        "dnsPolicy": "Default",
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [
            {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists", "effect": "NoSchedule"},
            *lost,
        ],
        # Two replicas never share a machine, not even while only one machine has joined.
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "DoNotSchedule",
                "minDomains": 2,
                "labelSelector": {"matchLabels": dict(selector)},
                "matchLabelKeys": ["pod-template-hash"],
            }
        ],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "coredns",
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "args": ["-conf", "/etc/coredns/Corefile"],
                "ports": [
                    {"name": "dns", "containerPort": 1053, "protocol": "UDP"},
                    {"name": "dns-tcp", "containerPort": 1053, "protocol": "TCP"},
                    {"name": "metrics", "containerPort": 9153, "protocol": "TCP"},
                    {"name": "liveness", "containerPort": 8080, "protocol": "TCP"},
                    {"name": "readiness", "containerPort": 8181, "protocol": "TCP"},
                ],
                "livenessProbe": probe(
                    "/health",
                    "liveness",
                    initialDelaySeconds=30,
                    timeoutSeconds=5,
                    periodSeconds=10,
                    failureThreshold=5,
                ),
                "readinessProbe": probe("/ready", "readiness", timeoutSeconds=2, periodSeconds=5, failureThreshold=3),
                "resources": {
                    "requests": {"cpu": "100m", "memory": f"{sizing.dns_estimate(pods)}Mi"},
                    "limits": {"memory": f"{sizing.dns_memory(pods)}Mi"},
                },
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns", "readOnly": True}],
            }
        ],
        "volumes": [
            {"name": "config", "configMap": {"name": "coredns", "items": [{"key": "Corefile", "path": "Corefile"}]}}
        ],
    }


class _Manifest(yaml.SafeLoader):
    """Takes 22:30 for text as kubectl does (go-yaml reads no numbers to the base of 60, which YAML 1.1 has)."""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str | int | float:
    if ":" in node.value:
        return str(node.value)
    return loader.construct_yaml_int(node) if node.tag.endswith(":int") else loader.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Manifest.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)


def _documents(file: Path) -> list[tuple[int, Any]]:
    """(line, content) of every document that is not empty."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BakeError(
            f"this manifest cannot be read: {error}",
            where=Place(file),
            remedy="correct extraObjects in the cluster file",
        ) from error
    found: list[tuple[int, Any]] = []
    try:
        loader = _Manifest(text)
        while loader.check_node():
            node = loader.get_node()
            assert node is not None  # noqa: S101  check_node() said so
            _refuse_duplicates(node, set())
            _refuse_growth(node)
            content = loader.construct_document(node)
            if content is not None:
                found.append((node.start_mark.line + 1, content))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = Place(file, mark.line + 1, mark.column + 1) if mark is not None else Place(file)
        raise BakeError(
            f"not YAML: {getattr(error, 'problem', error)}", where=place, remedy="correct the manifest"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        # What a tag or a bare word promises and is not: a day of no month, a number of thousands of digits.
        raise BakeError(
            f"not YAML that can be understood: {str(error)[:200]}", where=Place(file), remedy="correct the manifest"
        ) from error
    return found


def _refuse_growth(top: yaml.Node) -> None:
    """Raises for aliases by which a small document becomes a huge one, or one without end."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _LARGEST_DOCUMENT + 1  # within itself it has no end
            inner = () if isinstance(node, yaml.ScalarNode) else node.value
            parts = (part for item in inner for part in (item if isinstance(item, tuple) else (item,)))
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if size(top) > _LARGEST_DOCUMENT:
        raise yaml.MarkedYAMLError(problem="aliases make it too large", problem_mark=top.start_mark)


def _refuse_duplicates(node: yaml.Node, seen: set[int]) -> None:
    """Raises for a key that stands twice in one mapping, which YAML's loader takes in silence."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} stands here twice", problem_mark=key.start_mark)
                keys.add(key.value)
            _refuse_duplicates(value, seen)


def _flattened(content: Any) -> list[Any]:
    if isinstance(content, dict) and content.get("apiVersion") == "v1" and content.get("kind") == "List":
        items = content.get("items")
        return items if isinstance(items, list) else [content]
    return [content]


def _shapeless(candidate: Any) -> str | None:
    if not isinstance(candidate, dict):
        return "it is no mapping"
    for field, form in (("apiVersion", _API_VERSION), ("kind", _KIND)):
        if not isinstance(given := candidate.get(field), str):
            return f"{field} is missing"
        if not form.fullmatch(given):  # schemas are looked for in files of such names
            return f"{field} is not of the form that {field}s have"
    metadata = candidate.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        return "metadata.name is missing"
    return None


def _title(candidate: Any) -> str:
    if not isinstance(candidate, dict):
        return "this document"
    name = candidate["metadata"].get("name") if isinstance(candidate.get("metadata"), dict) else None
    return f"{candidate.get('kind', 'this object')} {name or 'without a name'}"
