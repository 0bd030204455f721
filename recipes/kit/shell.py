"""Which programs a POSIX shell program calls by name: a small reader of the shell's grammar, for the closure proof."""

from __future__ import annotations

import re

_WORDS = """
. : [ alias bg break cd continue declare echo eval exit export false fg getopts hash jobs let local mapfile printf pwd
read readonly return set shift shopt source test times trap true type ulimit umask unalias unset wait
"""
_BUILTINS = frozenset(_WORDS.split())
_BEFORE_COMMAND = frozenset(("!", "{", "command", "do", "elif", "else", "exec", "if", "then", "time", "until", "while"))
_AFTER_COMMAND = frozenset(("}", "done", "esac", "fi"))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_ASSIGNMENT = re.compile(r"\w+\+?=")
_OPAQUE = "\0"  # stands in a word for what only the running shell knows


def commands(text: str) -> frozenset[str]:
    """The names in command position that are neither builtins, keywords nor functions of this program.

    Names made at run time and arguments that are themselves commands (xargs, timeout) are not seen.
    """
    reader = _Reader(text)
    reader.read()
    return frozenset(reader.found - reader.functions - _BUILTINS)


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: set[str] = set()
        self.functions: set[str] = set()
        self._documents: list[str] = []  # ends of here-documents that begin on the next line

    def read(self, *, substitution: bool = False) -> None:
        """Reads a list of commands, in a substitution up to and with its closing parenthesis."""
        depth = 0
        cases: list[str] = []  # of each case around: "head" (up to `in`), "pattern" or "body"
        command, redirected = True, False
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in " \t" or self.text.startswith("\\\n", self.at):
                self.at += 2 if char == "\\" else 1
            elif char == "#":
                self._to("\n")
            elif char == "\n":
                self.at += 1
                self._skip_documents()
                command = True
            elif char in "<>":
                redirected = self._redirection()
            elif char in ";&|":
                self.at += 1
                if char == ";" and self.text.startswith(";", self.at) and cases:
                    self.at += 1
                    cases[-1] = "pattern"
                command = True
            elif char == "(":
                self.at += 1
                if not (cases and cases[-1] == "pattern"):
                    depth += 1
                command = True
            elif char == ")":
                self.at += 1
                if cases and cases[-1] == "pattern":
                    cases[-1], command = "body", True
                elif depth:
                    depth, command = depth - 1, False
                elif substitution:
                    return
            else:
                word = self._word()
                if redirected or (word.isdigit() and self.text[self.at : self.at + 1] in ("<", ">")):
                    redirected = False
                elif cases and cases[-1] == "head":
                    cases[-1] = "pattern" if word == "in" else "head"
                elif cases and cases[-1] == "pattern":
                    if word == "esac":
                        cases.pop()
                        command = False
                elif command:
                    command = self._command(word, cases)

    def _command(self, word: str, cases: list[str]) -> bool:
        """Takes a word in command position; is the next one in command position too?"""
        if definition := re.compile(r"[ \t]*\([ \t]*\)").match(self.text, self.at):
            self.functions.add(word)
            self.at = definition.end()
            return True
        if word == "case":
            cases.append("head")
        elif word == "esac" and cases:
            cases.pop()
        elif word in _BEFORE_COMMAND or _ASSIGNMENT.match(word) or word.startswith("-"):
            return True
        elif word not in _AFTER_COMMAND and word != "for" and _NAME.fullmatch(word):
            self.found.add(word)
        return False

    def _word(self) -> str:
        made = ""
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in " \t\n;&|()<>":
                break
            if char == "\\":
                made += self.text[self.at + 1 : self.at + 2].strip("\n")
                self.at += 2
            elif char == "'":
                self.at += 1
                made += _OPAQUE
                self._to("'")
                self.at += 1
            elif char == '"':
                made += _OPAQUE
                self._double_quoted()
            elif char in "$`":
                made += _OPAQUE
                self._expansion()
            else:
                made += char
                self.at += 1
        return made

    def _double_quoted(self) -> None:
        self.at += 1
        while self.at < len(self.text) and self.text[self.at] != '"':
            if self.text[self.at] == "\\":
                self.at += 2
            elif self.text[self.at] in "$`":
                self._expansion()
            else:
                self.at += 1
        self.at += 1

    def _expansion(self) -> None:
        if self.text.startswith("$((", self.at):
            self._to("))")
            self.at += 2
        elif self.text.startswith("$(", self.at):
            self.at += 2
            self.read(substitution=True)
        elif self.text.startswith("${", self.at):
            self.at += 2
            while self.at < len(self.text) and self.text[self.at] != "}":
                char = self.text[self.at]
                if char == "\\":
                    self.at += 2
                elif char == '"':
                    self._double_quoted()
                elif char in "$`":
                    self._expansion()
                else:
                    self.at += 1
            self.at += 1
        elif self.text[self.at] == "`":
            start = self.at + 1
            self.at = start
            self._to("`")
            inner = _Reader(self.text[start : self.at])
            inner.read()
            self.found |= inner.found
            self.at += 1
        else:  # $name, $1, $#
            self.at += 2

    def _redirection(self) -> bool:
        """Reads an operator; does a word follow that is a file's name?"""
        operator = re.compile(r"<<-?|[<>]+[&|]?").match(self.text, self.at)
        assert operator is not None  # noqa: S101 - the caller saw < or >
        self.at = operator.end()
        if operator[0].startswith("<<"):
            end = re.compile(r"[ \t]*\\?(['\"]?)(\w+)\1").match(self.text, self.at)
            if end is not None:
                self._documents.append(end[2])
                self.at = end.end()
            return False
        return True

    def _skip_documents(self) -> None:
        for end in self._documents:
            found = re.compile(rf"^\t*{end}$\n?", re.MULTILINE).search(self.text, self.at)
            self.at = found.end() if found is not None else len(self.text)
        self._documents.clear()

    def _to(self, end: str) -> None:
        found = self.text.find(end, self.at)
        self.at = found if found >= 0 else len(self.text)
