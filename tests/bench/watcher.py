"""A program on the machines' network: prints what came about and when (seconds since the epoch), one a line: "API" once
a control plane's API server is ready, and each node's name once it is Ready. It asks with one connection at a time, so
that it costs hardly anything of what it watches.

Arguments: CA, certificate, key, how many nodes there will be (it ends when all are Ready), and the addresses of the
control planes.
"""

from __future__ import annotations

import http.client
import json
import ssl
import sys
import time


def ready(context: ssl.SSLContext, address: str) -> bool:
    connection = http.client.HTTPSConnection(address, 6443, timeout=2, context=context)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def follow(context: ssl.SSLContext, address: str, told: set[str], count: int) -> None:
    """Every node that is Ready now or becomes it, until count are or the API server ends the watch."""
    connection = http.client.HTTPSConnection(address, 6443, timeout=600, context=context)
    try:
        connection.request("GET", "/api/v1/nodes?watch=true")
        answer = connection.getresponse()
        while len(told) <= count and answer.status == 200 and (line := answer.readline()):
            node = json.loads(line)["object"]
            name = node["metadata"]["name"]
            conditions = {each["type"]: each["status"] for each in node["status"].get("conditions", [])}
            if conditions.get("Ready") == "True" and name not in told:
                told.add(name)
                tell(name)
    except (OSError, http.client.HTTPException):
        pass
    finally:
        connection.close()


def tell(what: str) -> None:
    print(what, time.time(), flush=True)


def main(authority: str, certificate: str, key: str, count: str, *addresses: str) -> None:
    context = ssl.create_default_context(cafile=authority)
    context.load_cert_chain(certificate, key)
    told: set[str] = set()
    while len(told) <= int(count):  # the API is one more
        for address in addresses:
            if ready(context, address):
                if not told:
                    told.add("API")
                    tell("API")
                follow(context, address, told, int(count))
        time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
