"""`python -m tests.bench.mint CAS LIST OUT`: what by_hand/certificates does, by the bake's own code, in one process."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from recipes.kit import pki
from recipes.kit.profiles import KeyPair


def main(cas: Path, requests: Path, out: Path) -> None:
    start = datetime.now(UTC).replace(microsecond=0)
    pairs = {path.stem: KeyPair(path.read_bytes(), path.with_suffix(".key").read_bytes()) for path in cas.glob("*.crt")}
    for line in requests.read_text().splitlines():
        name, ca, subject, uses, names = line.split("|")
        parts = dict(part.split("=", 1) for part in subject.strip("/").split("/"))
        sans = tuple(san.partition(":")[2] for san in names.split(",") if san)
        asked = pki.Subject(parts["CN"], parts.get("O"), "serverAuth" in uses, "clientAuth" in uses, sans)
        key = pki.new_key("ecdsa-p256")
        end = start + timedelta(days=1096)
        certificate = pki.leaf(asked, key, pairs[ca], start=start, end=end, serial_seed=bytes(32))
        target = out / name
        target.parent.mkdir(exist_ok=True)
        target.with_suffix(".key").write_bytes(key)
        target.with_suffix(".crt").write_bytes(certificate)
    os.sync()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
