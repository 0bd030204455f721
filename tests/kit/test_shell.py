"""The closure proof's reading of shell programs."""

from __future__ import annotations

import pytest

from recipes.kit import shell


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("alpha one | beta two && gamma; delta &", {"alpha", "beta", "gamma", "delta"}),
        ("if ! alpha; then beta; else gamma; fi", {"alpha", "beta", "gamma"}),
        ("for x in one two; do alpha $x; done", {"alpha"}),
        ("case $1 in one | two) alpha ;; (three) beta ;; *) gamma ;; esac\ndelta", {"alpha", "beta", "gamma", "delta"}),
        ('x="$(alpha "$(beta)" c) not-this"', {"alpha", "beta"}),
        ("x=`alpha b`; A=1 B='2 3' gamma", {"alpha", "gamma"}),
        ("helper() { alpha; }\nhelper one\n( beta )", {"alpha", "beta"}),
        ("alpha 2>/dev/null >file <other\nexec 9>lock", {"alpha"}),
        ("cat <<END >x\nnot this\nEND\nalpha", {"cat", "alpha"}),
        ("# not this\nalpha # nor this\nx=${1#not}; echo $#; beta", {"alpha", "beta"}),
        ("echo 'not; this' \"nor; this\" \\\n  still-not\n$program x; /usr/bin/alpha", set()),
        ("command -v alpha && exec beta", {"alpha", "beta"}),
        ("n=$((1 + (2 | 3))); while read -r a; do alpha; done <file", {"alpha"}),
    ],
)
def test_names_in_command_position(text: str, names: set[str]) -> None:
    assert shell.commands(text) == names
