"""Runs on a machine: writes one ConfigMap after the other through its load balancer, and tells each outcome.

Arguments: URL of the API, CA certificate, client certificate and key (PEM files). A line for each write: seconds since
1970, the number, then "ok" or why not. A write counts as acknowledged when the API server said 201, or 409 to a
repeated try of the same name (the first answer was lost).
"""

from __future__ import annotations

import http.client
import json
import ssl
import sys
import time
from urllib.parse import urlsplit

PATH = "/api/v1/namespaces/default/configmaps"


def main(url: str, authority: str, certificate: str, key: str) -> None:
    context = ssl.create_default_context(cafile=authority)
    context.load_cert_chain(certificate, key)
    place = urlsplit(url)
    connection: http.client.HTTPSConnection | None = None
    number = 0
    while True:
        number += 1
        body = json.dumps({"metadata": {"name": f"write-{number}", "labels": {"app": "writer"}}, "data": {}})
        try:
            if connection is None:
                connection = http.client.HTTPSConnection(str(place.hostname), place.port, timeout=5, context=context)
            connection.request("POST", PATH, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            told = "ok" if answer.status == 201 else f"HTTP {answer.status}"
        except (OSError, http.client.HTTPException) as error:
            told = repr(error)
            if connection is not None:
                connection.close()
            connection = None
        print(f"{time.time():.3f} {number} {told}", flush=True)
        time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
