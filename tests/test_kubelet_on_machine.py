"""What runs before the kubelet: links to its certificates that a power cut took away."""

from __future__ import annotations

import subprocess
from pathlib import Path

from recipes.kit import overlay

PROGRAM = overlay.OVERLAYS / "worker/usr/local/lib/nodebake/relink-certificates"


def relinked(folder: Path) -> str:
    return subprocess.run(["sh", PROGRAM, folder], check=True, capture_output=True, text=True).stdout


def test_a_lost_link_leads_to_the_newest_certificate(tmp_path: Path) -> None:
    for name in ("2026-11-01-10-00-00", "2027-09-01-10-00-00"):
        (tmp_path / f"kubelet-client-{name}.pem").write_text(name)
    (tmp_path / "kubelet-client-2027-10-01-10-00-00.pem").write_text("")  # its bytes were lost too
    (tmp_path / "kubelet-client-current.pem").symlink_to(tmp_path / "gone.pem")
    assert "kubelet-client-current.pem was lost" in relinked(tmp_path)
    assert (tmp_path / "kubelet-client-current.pem").read_text() == "2027-09-01-10-00-00"
    assert not (tmp_path / "kubelet-server-current.pem").is_symlink(), "there is none of that kind"
    assert relinked(tmp_path) == "", "a link that leads somewhere stays"


def test_before_the_kubelet_has_joined_there_is_nothing_to_do(tmp_path: Path) -> None:
    assert relinked(tmp_path) == ""
    assert relinked(tmp_path / "none") == ""
    assert list(tmp_path.iterdir()) == []
