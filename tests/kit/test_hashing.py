"""Hashing: once per run, and again when a file is no longer the same."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from recipes.kit import hashing


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read."""
    read: list[Path] = []
    true = hashing.hash_file

    def counting(path: Path, algorithm: str = "sha256") -> str:
        read.append(path)
        return true(path, algorithm)

    monkeypatch.setattr(hashing, "hash_file", counting)
    return read


def test_a_file_is_hashed_once(tmp_path: Path, counted: list[Path]) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"bytes")
    assert hashing.known(file.stat()) is None
    digests = {hashing.sha256_of(file) for _ in range(3)}
    assert digests == {hashlib.sha256(b"bytes").hexdigest()} == {hashing.known(file.stat())}
    assert counted == [file]


def test_a_file_whose_time_and_size_were_kept_is_hashed_again(tmp_path: Path, counted: list[Path]) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"bytes")
    stat = file.stat()
    hashing.sha256_of(file)
    file.write_bytes(b"BYTES")
    while file.stat().st_ctime_ns == stat.st_ctime_ns:  # the kernel's clock ticks every few milliseconds
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashing.sha256_of(file) == hashlib.sha256(b"BYTES").hexdigest()
    assert counted == [file, file]


def test_what_was_computed_elsewhere_is_remembered(tmp_path: Path, counted: list[Path]) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"bytes")
    hashing.remember(file.stat(), "ab" * 32)
    assert hashing.sha256_of(file) == "ab" * 32
    assert counted == []
