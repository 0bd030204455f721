"""Where the secret store's files lie: in a folder, or in one encrypted file of it that is decrypted in memory alone.

That file, `secrets.tar.age`, is a tarball in age's format (https://age-encryption.org/v1), for a passphrase or for
recipients. Without Nodebake: `age --decrypt secrets.tar.age | tar -x`. What is no secret stays beside it.
"""

from __future__ import annotations

import io
import os
import shlex
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from recipes.kit.errors import BakeError
from recipes.kit.locks import locked

ENCRYPTED = "secrets.tar.age"
_PLAIN = frozenset(
    (ENCRYPTED, "choices.json", "generation.json", "members.json")
)  # and what begins with a dot: never encrypted
_RECIPIENTS = "age-recipients"  # among the encrypted files: for whom they are encrypted anew, one a line
UNDER_WAY = ".new"  # what a file's name ends with while it is written
_ONE = "give age1..., or a file with one a line: age1..., or SSH's public keys (ed25519, RSA)"


class Key:
    """What opens an encrypted store. file: age's or OpenSSH's identities, or a passphrase, in its first line; None: a
    passphrase, which is asked for on the terminal, once."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._passphrase: str | None = None
        self._read: bytes | None = None

    def decrypt(self, data: bytes, where: Path) -> bytes:
        """Raises BakeError where this key does not open it; never says what the key is."""
        import pyrage

        for_passphrase = data[:40].split(b"\n", 1)[-1].startswith(b"-> scrypt ")
        try:
            if for_passphrase:
                return bytes(pyrage.passphrase.decrypt(data, self.passphrase(where)))
            return bytes(pyrage.decrypt(data, self._identities(where)))
        except pyrage.DecryptError:
            pass
        raise BakeError(
            f"this {'passphrase' if for_passphrase else 'key'} does not open the secret store, or the file is damaged",
            where=where,
            remedy="give the right one (on the terminal, or by key=FILE); a damaged file comes from a backup",
        )

    def passphrase(self, where: Path, *, new: bool = False) -> str:
        """new: typed twice."""
        if self._passphrase is None:
            if self._file is None:
                self._passphrase = _asked(where, new)
            else:
                self._passphrase = self._content(where).split(b"\n")[0].rstrip(b"\r").decode(errors="backslashreplace")
            if not self._passphrase:
                raise BakeError("the passphrase is empty", where=self._file or where, remedy="give one")
        return self._passphrase

    def recipients(self) -> list[str]:
        """Of the identities in the file; none where it holds a passphrase, or there is no file."""
        if self._file is None or not _is_identity(self._content(self._file)):
            return []
        found = self._identities(self._file)
        if not all(hasattr(identity, "to_public") for identity in found):
            raise BakeError(
                "the recipient of an SSH key is in the file beside it",
                where=self._file,
                remedy=f"name that one: doit encrypt {shlex.quote(str(self._file))}.pub",
            )
        return [str(identity.to_public()) for identity in found]

    def _identities(self, where: Path) -> list[Any]:
        import pyrage

        content, found = self._content(where), list[Any]()
        try:
            if content.startswith(b"-----BEGIN"):
                return [pyrage.ssh.Identity.from_buffer(content)]
            for line in content.decode().splitlines():
                if line.strip() and not line.startswith("#"):
                    found.append(pyrage.x25519.Identity.from_str(line.strip()))
        except (pyrage.IdentityError, UnicodeDecodeError):
            found.clear()
        # Raised out here, so that no exception carries a part of the key into a traceback.
        if not found:
            raise BakeError(
                "this is no key that can be used",
                where=self._file,
                remedy="give a file of age-keygen's, or an SSH key (ed25519 or RSA) that has no passphrase of its own",
            )
        return found

    def _content(self, where: Path) -> bytes:
        if self._file is None:
            raise BakeError("the secret store is encrypted for a key", where=where, remedy="say key=FILE with that key")
        if self._read is None:
            try:
                with self._file.open("rb") as stream:
                    found = os.fstat(stream.fileno())
                    self._read = stream.read()
            except OSError as error:
                raise BakeError(
                    f"the key cannot be read: {error.strerror}", where=self._file, remedy="name another by key=FILE"
                ) from error
            if stat.S_ISREG(found.st_mode) and found.st_mode & 0o077:
                raise BakeError(
                    "others on this computer may read the key",
                    where=self._file,
                    remedy=f"chmod go= {shlex.quote(str(self._file))}, and consider whether someone already has",
                )
        return self._read


def _is_identity(content: bytes) -> bool:
    lines = [line for line in content.splitlines() if line.strip() and not line.startswith(b"#")]
    return bool(lines) and lines[0].startswith((b"AGE-", b"-----BEGIN"))


def _asked(where: Path, new: bool) -> str:
    import getpass

    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        raise BakeError(
            "the passphrase of the secret store cannot be asked for without a terminal",
            where=where,
            remedy="say key=FILE with a file that holds it (key=/dev/fd/3 for a pipe)",
        ) from None
    try:
        given = getpass.getpass(f"{'New passphrase' if new else 'Passphrase'} of {where}: ")
        again = getpass.getpass("Once more: ") if new else given
    except (EOFError, KeyboardInterrupt):
        raise BakeError("no passphrase was given", where=where, remedy="type it, or say key=FILE") from None
    if again != given:
        raise BakeError("the two passphrases differ", where=where, remedy="try again")
    return given


class Folder:
    """The files as they are, 0700 and 0600. Only the store's lock's holder writes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError, and BakeError where others may read it."""
        path = self.directory / name
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as stream:
            _private(os.fstat(descriptor), path, self.directory)
            return stream.read()

    def write(self, name: str, data: bytes) -> None:
        """Whole or not at all."""
        path = self.directory / name
        for folder in reversed([*path.relative_to(self.directory).parents][:-1]):
            (self.directory / folder).mkdir(mode=0o700, exist_ok=True)
            (self.directory / folder).chmod(0o700)
        temporary = path.with_name(path.name + UNDER_WAY)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(temporary, flags, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(descriptor, 0o600)
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
        temporary.rename(path)

    def exists(self, name: str) -> bool:
        return (self.directory / name).exists()

    def remove(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def sync(self, names: Iterable[str]) -> None:
        """What was written by these names is there after a power cut as well."""
        for folder in sorted({(self.directory / name).parent for name in names}):
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def names(self) -> list[str]:
        """Of all secret files, also of what a cut left half written."""
        found = (path for path in self.directory.rglob("*") if not path.is_dir())
        names = (path.relative_to(self.directory).as_posix() for path in found)
        return sorted(name for name in names if not name.startswith(".") and name not in _PLAIN)

    def commit(self) -> None:
        """Everything that was written is there already."""


class Vault(Folder):
    """The encrypted file: what is written reaches the disk by commit(), all at once."""

    def __init__(self, directory: Path, key: Key, files: dict[str, bytes] | None = None) -> None:
        """files: what a new one holds; None: what it holds is there."""
        super().__init__(directory)
        self._key, self._path = key, directory / ENCRYPTED
        self._changed = files is not None
        self.files = _unpacked(key.decrypt(super().read(ENCRYPTED), self._path)) if files is None else files

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]

    def write(self, name: str, data: bytes) -> None:
        self.files[name] = data
        self._changed = True

    def exists(self, name: str) -> bool:
        return any(other == name or other.startswith(f"{name}/") for other in self.files)

    def remove(self, name: str) -> None:
        self._changed |= self.files.pop(name, None) is not None

    def sync(self, names: Iterable[str]) -> None:
        pass

    def names(self) -> list[str]:
        return sorted(name for name in self.files if name != _RECIPIENTS)

    def commit(self) -> None:
        import pyrage

        if not self._changed:
            return
        data = _packed(self.files)
        if recipients := self.files.get(_RECIPIENTS, b"").decode().splitlines():
            data = pyrage.encrypt(data, [_recipient(line, str(self._path)) for line in recipients])
        else:
            data = pyrage.passphrase.encrypt(data, self._key.passphrase(self._path))
        super().write(ENCRYPTED, data)
        super().sync([ENCRYPTED])
        self._changed = False


def prepare(directory: Path) -> None:
    """Makes the store's folder, where it is not there. Raises BakeError unless it is this user's alone."""
    if not directory.exists():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)  # whatever the umask took
    found = directory.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise BakeError(
            "the secret store is not a folder", where=directory, remedy="choose one with `doit secrets=DIR`"
        )
    _private(found, directory, directory)


def open_files(directory: Path, key: Key) -> Folder:
    """The store's files; what encrypt() or decrypt() left when it was cut off is removed. BakeError: plain files lie
    beside the encrypted one that are not what it holds."""
    folder = Folder(directory)
    if not folder.exists(ENCRYPTED):
        return folder
    vault = Vault(directory, key)
    left = folder.names()
    for name in left:
        if not name.endswith(UNDER_WAY) and vault.files.get(name) != folder.read(name):
            raise BakeError(
                f"{name} lies in the secret store unencrypted, and is not what {ENCRYPTED} holds",
                where=directory / name,
                remedy="find out which of the two is the cluster's, and move the other one away",
            )
    _remove(folder, left)
    return vault


def encrypt(directory: Path, key: Key, recipients: Sequence[str]) -> None:
    """Encrypts the store's files, also of one that nothing was minted in yet, and anew those that are encrypted.

    For the recipients (age1..., or files of such lines and of SSH's public keys); without any, for what is in the key's
    file, or for a passphrase. The plain files are removed once the encrypted one is safe on the disk. Raises BakeError.
    """
    prepare(directory)
    with locked(directory / ".lock"):
        files = open_files(directory, key)
        held = {name: files.read(name) for name in files.names() if not name.endswith(UNDER_WAY)}
        given = [line for word in recipients for line in _lines(word)]
        if isinstance(files, Vault):
            key = Key()  # what it is encrypted for anew is another
        if given or (given := key.recipients()):
            held[_RECIPIENTS] = "".join(f"{line}\n" for line in given).encode()
        else:
            key.passphrase(directory / ENCRYPTED, new=True)
        Vault(directory, key, held).commit()
        plain = Folder(directory)
        _remove(plain, plain.names())


def decrypt(directory: Path, key: Key) -> None:
    """Puts the files into the folder again, as they were. Raises BakeError."""
    prepare(directory)
    with locked(directory / ".lock"):
        files, plain = open_files(directory, key), Folder(directory)
        if not isinstance(files, Vault):
            raise BakeError("this secret store is not encrypted", where=directory, remedy="nothing need be done")
        for name in files.names():
            plain.write(name, files.read(name))
        plain.sync([*files.names(), ENCRYPTED])
        plain.remove(ENCRYPTED)
        plain.sync([ENCRYPTED])


def _private(found: os.stat_result, path: Path, directory: Path) -> None:
    """Raises BakeError unless it is this user's alone; root under sudo works for the person who called it."""
    caller = os.environ.get("SUDO_UID") if os.geteuid() == 0 else None
    if str(found.st_uid) not in (str(os.geteuid()), caller):
        raise BakeError(
            f"the secret store belongs to user {found.st_uid}, this is user {os.geteuid()}",
            where=path,
            remedy=f"bake as its owner, or give it to this user: chown -R {os.geteuid()} {shlex.quote(str(directory))}",
        )
    if found.st_mode & 0o077:
        raise BakeError(
            "others on this computer may read the secret store",
            where=path,
            remedy=f"chmod -R go= {shlex.quote(str(directory))}, and consider whether someone already has",
        )


def _remove(folder: Folder, names: Sequence[str]) -> None:
    for name in names:
        folder.remove(name)
        parent = (folder.directory / name).parent
        with suppress(OSError):  # it holds more
            while parent != folder.directory:
                parent.rmdir()
                parent = parent.parent
    folder.sync([ENCRYPTED])


def _lines(word: str) -> list[str]:
    """The recipients that a word of the command line names."""
    if word.startswith("age1"):
        _recipient(word, word)
        return [word]
    try:
        text = Path(word).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BakeError(f"the recipients cannot be read: {error}", where=word, remedy=_ONE) from error
    numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    found = {line: number for number, line in numbered if line and not line.startswith("#")}
    if not found:
        raise BakeError("there is no recipient in it", where=word, remedy=_ONE)
    for line, number in found.items():
        _recipient(line, f"{word}:{number}")
    return list(found)


def _recipient(line: str, where: str) -> object:
    import pyrage

    try:
        return (pyrage.ssh if line.startswith("ssh-") else pyrage.x25519).Recipient.from_str(line)
    except pyrage.RecipientError:  # the line itself is not told: it may be a key, by mistake
        raise BakeError("this is no recipient", where=where, remedy=_ONE) from None


def _packed(files: dict[str, bytes]) -> bytes:
    import tarfile  # here, as pyrage above: most bakes find no encrypted store

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o600
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _unpacked(data: bytes) -> dict[str, bytes]:
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {info.name: stream.read() for info in tar if (stream := tar.extractfile(info)) is not None}
