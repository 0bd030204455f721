"""That the flood measures what it says: a small one, with every part of it."""

from __future__ import annotations

from pathlib import Path

from tests import plane
from tests.bench import flood


def test_every_machine_gets_its_certificates_and_no_other(binaries: Path, tmp_path: Path) -> None:
    with plane.begun(tmp_path, binaries, flood.cluster_of(30)) as (stand, server):
        server.until_true(lambda: plane.is_ready(stand.admin), "ready")
        goals, facts = flood.measured(stand, server)
    assert goals[0].name == "60 certificates"
    assert facts["refused, as they had to be"] == "3"
