"""What must be true of a cluster: nodes Ready, Services that answer, volumes that keep, nothing fetched."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.lab import workload
from tests.lab.host import LabError
from tests.lab.lab import Lab
from tests.lab.machine import Machine

told: list[str] = []  # figures of this run, for the end of the report


@dataclass
class Clock:
    """Seconds since the machines were switched on, by what had been reached."""

    started: float = field(default_factory=time.monotonic)
    reached: dict[str, float] = field(default_factory=dict)

    def mark(self, what: str) -> None:
        """Only the first time counts: what is asked again had been reached before."""
        self.reached.setdefault(what, round(time.monotonic() - self.started, 1))


def apply(lab: Lab, *objects: dict[str, Any]) -> None:
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
    # Unchecked: to hand out its schema costs an emulated API server more than half a minute.
    command = ("apply", "--server-side", "--validate=ignore", "-f", "-")
    lab.wait(lambda: lab.kubectl(*command, stdin=text), 30, "the API server takes the objects")


def get(lab: Lab, *what: str) -> Any:
    """What `kubectl get` tells, as data."""
    return json.loads(lab.kubectl("get", *what, "-o", "json").stdout)


def items(lab: Lab, *what: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = get(lab, *what)["items"]
    return found


def condition(thing: dict[str, Any], kind: str) -> bool:
    """Whether a Node's or Pod's condition is "True"."""
    conditions = thing.get("status", {}).get("conditions", [])
    return any(each["type"] == kind and each["status"] == "True" for each in conditions)


def api_ready(lab: Lab) -> bool:
    return lab.kubectl("get", "--raw", "/readyz").stdout == "ok"


def ready_nodes(lab: Lab) -> set[str]:
    return {node["metadata"]["name"] for node in items(lab, "nodes") if condition(node, "Ready")}


def wait_ready(lab: Lab, seconds: float, names: set[str] | None = None, clock: Clock | None = None) -> Clock:
    """Until the API answers and these nodes (all, if none are named) are Ready."""
    clock = clock or Clock()
    wanted = names or {node.name for node in lab.cluster.kubelets}
    lab.wait(lambda: api_ready(lab), seconds, "an API server is ready")
    clock.mark("API ready")
    lab.wait(lambda: ready_nodes(lab) >= wanted, seconds, f"nodes are Ready: {' '.join(sorted(wanted))}")
    clock.mark("all Ready" if names is None else "nodes Ready")
    return clock


def wait_installed(lab: Lab, seconds: float) -> None:
    """Until first boot has told its success on every machine."""
    for name in sorted(lab.machines):
        wait_machine_installed(lab.machine(name), seconds)


def wait_machine_installed(machine: Machine, seconds: float) -> None:
    machine.wait(lambda: machine.run("test -e /var/lib/nodebake/installed").returncode == 0, seconds, "is installed")


def wait_pods(lab: Lab, selector: str, count: int, seconds: float = 120) -> list[dict[str, Any]]:
    """The pods with these labels, once there are so many and all are Ready."""

    def found() -> list[dict[str, Any]]:
        pods = [pod for pod in items(lab, "pods", "-l", selector) if "deletionTimestamp" not in pod["metadata"]]
        return pods if len(pods) == count and all(condition(pod, "Ready") for pod in pods) else []

    return lab.wait(found, seconds, f"{count} pods {selector} are Ready")


def containers(lab: Lab) -> set[tuple[str, str]]:
    """Pod and container, of all that run."""
    return {
        (pod["metadata"]["name"], each["containerID"])
        for pod in items(lab, "pods", "-A")
        for each in pod["status"].get("containerStatuses", [])
        if "running" in each["state"]
    }


def runs_pods(lab: Lab) -> list[str]:
    """Names of the nodes that run whatever asks for no toleration."""
    return sorted(node.name for node in lab.cluster.kubelets if not node.taints)


def fetch_from_pod(lab: Lab, pod: str, url: str) -> str:
    asked = ("busybox", "timeout", "5", "busybox", "wget", "-q", "-O", "-", url)  # its own -T crashes it
    return lab.kubectl("exec", pod, "--", *asked).stdout.strip()


def fetch_from_machine(lab: Lab, name: str, url: str) -> str:
    program = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=3).read().decode(), end='')"
    return lab.machine(name).run("python3", "-c", program).stdout.strip()


def everything_works(lab: Lab, clock: Clock | None = None) -> None:
    """The whole list. clock: told when the first Service answered."""
    names = runs_pods(lab)
    apply(lab, *workload.web())
    address = lab.wait(lambda: get(lab, "service", "web")["spec"]["clusterIP"], 30, "the Service has an address")
    # From the machine itself, which has no default route.
    lab.wait(
        lambda: fetch_from_machine(lab, names[0], f"http://{address}/") in names, 120, "the ClusterIP answers a machine"
    )
    if clock:
        clock.mark("Service answers")
    pods = {pod["spec"]["nodeName"]: pod for pod in wait_pods(lab, "app=web", len(names))}
    assert sorted(pods) == names, "one on each node without taints, none on another"
    own = {name: pod["metadata"]["name"] for name, pod in pods.items()}
    pods_reach_each_other(lab, pods, own)
    services_answer(lab, names, own, address)
    for name, pod in own.items():
        assert lab.kubectl("logs", pod).stdout == f"serving on {name}\n"
        assert lab.kubectl("exec", pod, "--", "busybox", "cat", "/tmp/www/index.html").stdout.strip() == name  # noqa: S108
    storage_label_is_obeyed(lab)
    volume_keeps_its_data(lab)
    components_are_healthy(lab)
    nothing_was_pulled(lab)


def pods_reach_each_other(lab: Lab, pods: dict[str, dict[str, Any]], own: dict[str, str]) -> None:
    for source in own.values():
        for name, pod in pods.items():
            pod_reaches(lab, source, f"http://{pod['status']['podIP']}:8080/", [name])


def services_answer(lab: Lab, names: list[str], own: dict[str, str], address: str) -> None:
    """By ClusterIP, by NodePort of every machine that runs a kubelet; and CoreDNS tells the name's address."""
    for pod in own.values():
        pod_reaches(lab, pod, f"http://{address}/", names)
        pod_finds(lab, pod, "web.default.svc", address)
    last = lab.cluster.kubelets[-1].name
    for node in lab.cluster.kubelets:
        machine_reaches(lab, last, f"http://{node.address}:{workload.PORT}/", names)
        machine_reaches(lab, node.name, f"http://{address}/", names)


def pod_finds(lab: Lab, pod: str, name: str, address: str) -> None:
    lab.wait(lambda: looked_up(lab, pod, name) == address, 60, f"the pod {pod} finds {name}")


def looked_up(lab: Lab, pod: str, name: str) -> str:
    """The address that a pod's resolver finds, asked by a program that uses no library for it."""
    asked = ("busybox", "nslookup", f"{name}.{lab.cluster.dns_domain}")
    answer = lab.kubectl("exec", pod, "--", *asked).stdout.rpartition("Name:")[2]
    return answer.rpartition("Address:")[2].strip()


def pod_reaches(lab: Lab, pod: str, url: str, names: list[str]) -> None:
    lab.wait(lambda: fetch_from_pod(lab, pod, url) in names, 60, f"the pod {pod} reaches {url}")


def machine_reaches(lab: Lab, name: str, url: str, names: list[str]) -> None:
    lab.wait(lambda: fetch_from_machine(lab, name, url) in names, 60, f"the machine {name} reaches {url}")


def storage_label_is_obeyed(lab: Lab) -> None:
    labelled = [node for node in lab.cluster.kubelets if node.storage]
    assert labelled, "this cluster file has no storage label to try"
    apply(lab, workload.on_storage(str(labelled[0].storage)))
    pods = wait_pods(lab, "app=on-storage", 3)
    assert {pod["spec"]["nodeName"] for pod in pods} == {labelled[0].name}


def volume_keeps_its_data(lab: Lab) -> None:
    apply(lab, *workload.claim(lab.cluster.storage_classes[0]), workload.with_claim("writer", "echo kept >/data/file"))
    wait_phase(lab, "writer", "Succeeded")
    volume = get(lab, "pvc", "data")["spec"]["volumeName"]
    assert volume == next(f"{node.name}-{v.name}" for node in lab.cluster.nodes for v in node.volumes)
    lab.kubectl("delete", "pod", "writer", "--wait")
    apply(lab, workload.with_claim("reader", "busybox cat /data/file"))
    wait_phase(lab, "reader", "Succeeded")
    assert lab.kubectl("logs", "reader").stdout == "kept\n"


def wait_phase(lab: Lab, pod: str, phase: str, seconds: float = 60) -> None:
    lab.wait(lambda: get(lab, "pod", pod)["status"].get("phase") == phase, seconds, f"the pod {pod} has {phase}")


def components_are_healthy(lab: Lab) -> None:
    statuses = items(lab, "componentstatuses")
    assert {each["metadata"]["name"] for each in statuses} >= {"controller-manager", "scheduler", "etcd-0"}
    assert all(condition({"status": each}, "Healthy") for each in statuses), statuses
    told = lab.kubectl("get", "--raw", "/readyz?verbose").stdout
    assert "readyz check passed" in told and "[-]" not in told, told
    leases = {lease["metadata"]["name"]: lease["spec"] for lease in items(lab, "leases", "-n", "kube-system")}
    for name in ("kube-controller-manager", "kube-scheduler"):
        assert leases[name]["holderIdentity"] and leases[name]["leaseDurationSeconds"] == 15


def nothing_was_pulled(lab: Lab) -> None:
    assert [event["message"] for event in items(lab, "events", "-A") if event["reason"] == "Pulling"] == []


# Multicast that a machine's kernel and resolver send before they are told not to; it ends at the switch.
ON_THE_WIRE = {"igmp", "llmnr", "mld", "neighbour solicitation"}


def nothing_was_asked_outside(lab: Lab) -> None:
    strays = [stray for stray in lab.strays() if stray.kind not in ON_THE_WIRE]
    assert strays == [], strays


def each_second(condition: Callable[[], bool], seconds: float) -> list[bool]:
    """The answers to a question asked once a second."""
    answers = []
    for _ in range(int(seconds)):
        try:
            answers.append(condition())
        except LabError:
            answers.append(False)
        time.sleep(1)
    return answers
