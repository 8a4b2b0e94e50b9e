"""Who may do what: tokens with roles, kept as hashes in a file that may change while the service runs.

A token stands in `Authorization: Bearer TOKEN`, or is the password of HTTP's basic scheme, which browsers ask for; the
user name does not matter. Tokens are made here, of 256 random bits, so that a plain hash is enough.
"""

import base64
import binascii
import fcntl
import hashlib
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request

from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.service.problems import BUSY, Problem, log
from lmeraser_jax.storage.atomic_files import write_json

ROLES = ("predict", "erase", "read")
LONGEST_NAME = 64  # characters
CHALLENGE = {"WWW-Authenticate": 'Basic realm="lmeraser", charset="UTF-8"'}


@dataclass(frozen=True)
class Caller:
    """Who sent a request: the name of the token, never the token."""

    name: str
    roles: frozenset[str]


ANYONE = Caller("", frozenset(ROLES))  # where there are no tokens


@dataclass(frozen=True)
class Token:
    """One line of the file."""

    caller: Caller
    hash: str  # SHA-256 of the token, hexadecimal


def make_token(path: Path, name: str, roles: Sequence[str]) -> str:
    """Adds a token to the file, which is made if need be, and returns it: nobody can read it there.

    Raises `UserError` for an illegal name or role, a name that has a token, or a file that cannot be used.
    """
    problems = []
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        problems.append(f"--name={name[:LONGEST_NAME]}: must be 1 to {LONGEST_NAME} printable characters")
    strange = sorted(set(roles) - set(ROLES))
    if strange or not roles:
        problems.append(f"--role={join_limited(strange)}: legal: {', '.join(ROLES)}, repeated for several")
    if not path.name:
        problems.append(f"--tokens={path}: is a folder; name a file")
    raise_all(problems)
    secret = secrets.token_urlsafe(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "wb") as lock:  # the file itself is replaced
            fcntl.flock(lock, fcntl.LOCK_EX)  # so that no entry of another process is lost
            tokens = read_tokens(path) if path.exists() else ()
            if any(token.caller.name == name for token in tokens):
                raise UserError(f"--name={name}: has a token in {path}; choose another name, or delete its entry first")
            rows = [*map(_values, tokens), _values(Token(Caller(name, frozenset(roles)), _hash(secret)))]
            write_json(path, {"tokens": rows})
            path.chmod(0o600)
    except OSError as error:
        raise UserError(f"--tokens={path} cannot be written: {error.strerror}") from error
    return secret


def _values(token: Token) -> dict[str, object]:
    return {"name": token.caller.name, "roles": sorted(token.caller.roles), "sha256": token.hash}


def read_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens of a file. Raises `UserError` where it holds anything else."""
    try:
        rows = json.loads(path.read_text("utf-8"))["tokens"]
        tokens = tuple(Token(Caller(row["name"], frozenset(row["roles"])), row["sha256"]) for row in rows)
        sound = all(
            isinstance(token.caller.name, str)
            and token.caller.roles <= {*ROLES}
            and len(bytes.fromhex(token.hash)) == 32
            for token in tokens
        )
    except OSError as error:
        raise UserError(f"--tokens={path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"--tokens={path} is no file of tokens; lmeraser tokens makes one") from error
    if not sound:
        raise UserError(f"--tokens={path} is no file of tokens; legal roles: {', '.join(ROLES)}")
    return tokens


class Guard:
    """Finds out who sent a request. The file is read again when it has changed, so that a token can be withdrawn."""

    def __init__(self, path: Path | None):
        self._path = path
        self._read_as: tuple[int, int] | None = None
        self._tokens: tuple[Token, ...] = ()
        if path is not None:
            self._refresh(path)

    def require(self, *roles: str) -> Callable[[Request], Awaitable[Caller]]:
        """A dependency that gives the caller, who must have one of these roles."""

        async def caller(request: Request) -> Caller:
            who = self.caller_of(request.headers.get("authorization", ""))
            if not who.roles.intersection(roles):
                raise Problem(403, f"this token may not do that: it needs the role {' or '.join(roles)}")
            return who

        return caller

    def caller_of(self, authorization: str) -> Caller:
        """Whose token a header holds. All are compared, in constant time.

        Raises `Problem`: 401 where it is nobody's, 503 where the tokens cannot be read.
        """
        if self._path is None:
            return ANYONE
        try:
            self._refresh(self._path)
        except UserError as error:
            log.error("%s", error)
            raise Problem(503, "the tokens cannot be read now; the service's log says why", headers=BUSY) from None
        given, who = _hash(_secret(authorization)), None
        for token in self._tokens:
            if hmac.compare_digest(token.hash, given):
                who = token.caller
        if who is None:
            raise Problem(401, "a token is needed: Authorization: Bearer TOKEN", headers=CHALLENGE)
        return who

    def _refresh(self, path: Path) -> None:
        """Reads the file if it is another one than before; one that cannot be read lets nobody in."""
        try:
            status = path.stat()
        except OSError as error:
            self._tokens, self._read_as = (), None
            raise UserError(f"--tokens={path} cannot be read: {error.strerror}") from error
        if (status.st_mtime_ns, status.st_size) != self._read_as:
            self._tokens, self._read_as = (), None
            self._tokens, self._read_as = read_tokens(path), (status.st_mtime_ns, status.st_size)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


def _secret(authorization: str) -> str:
    """The token of an Authorization header; "" where it has none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
