"""Encryption at rest of secrets and custom headers.

Owns keys and ciphertexts, and the one operation that goes through all ciphertexts (:func:`rekey`). Knows
nothing of what is signed or sent.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import ColumnElement, FromClause, Table, select, update

from ..errors import ConfigurationError, DecryptionError
from .database import Database
from .models import Endpoint, Secret

#: Separates our derived keys from everything else a host derives from its ``SECRET_KEY``.
_HKDF_INFO = b"flask_rq_webhooks: encryption at rest, v1"


class Cipher:
    """Encrypt with the first key, decrypt with any.

    :param keys: newest first. A key that is not a Fernet key (32 bytes, URL-safe base64) is treated as a
        passphrase with full entropy, and a Fernet key is derived from it (HKDF-SHA256, RFC 5869).
    :raises ConfigurationError: when there is no key.
    """

    def __init__(self, keys: Sequence[str | bytes]) -> None:
        if not keys:
            raise ConfigurationError(
                "flask_rq_webhooks has no key to encrypt secrets with; set SECRET_KEY, or "
                "RQ_WEBHOOKS_ENCRYPTION_KEYS to a list of keys, newest first."
            )
        self._fernet = MultiFernet([Fernet(_fernet_key(key)) for key in keys])

    @classmethod
    def from_config(
        cls,
        encryption_keys: Sequence[str],
        secret_key: str | bytes | None,
        fallbacks: Sequence[str | bytes] = (),
    ) -> Cipher:
        """Return the cipher of an app.

        Keys derived from ``SECRET_KEY`` can still decrypt after ``ENCRYPTION_KEYS`` is introduced, so
        introducing it loses nothing.

        :param encryption_keys: ``RQ_WEBHOOKS_ENCRYPTION_KEYS``.
        :param secret_key: the app's ``SECRET_KEY``.
        :param fallbacks: the app's ``SECRET_KEY_FALLBACKS``.
        :raises ConfigurationError: when nothing is set.
        """
        return cls([*encryption_keys, *(key for key in (secret_key, *fallbacks) if key)])

    def encrypt(self, text: str) -> str:
        """Return *text* encrypted with the first key."""
        return self._fernet.encrypt(text.encode()).decode("ascii")

    def decrypt(self, text: str) -> str:
        """Return the text that was passed to :meth:`encrypt`.

        :raises DecryptionError: when no key opens *text*.
        """
        return self._opened(self._fernet.decrypt, text)

    def renew(self, text: str) -> str:
        """Return *text*, which any of the keys encrypted, re-encrypted with the first key.

        :raises DecryptionError: when no key opens *text*.
        """
        return self._opened(self._fernet.rotate, text)

    def _opened(self, read: Callable[[str], bytes], text: str) -> str:
        try:
            return read(text).decode()
        except InvalidToken as exc:
            raise DecryptionError(
                "A stored secret or header cannot be decrypted with any configured key. Nothing is lost: put "
                "the key it was stored with back, after the new one, in RQ_WEBHOOKS_ENCRYPTION_KEYS (or in "
                "SECRET_KEY_FALLBACKS, where keys are derived from SECRET_KEY), then run "
                "`flask rq-webhooks rekey`."
            ) from exc

    def __repr__(self) -> str:
        return "<Cipher>"


def rekey(
    database: Database, cipher: Cipher, *, batch: int = 500, progress: Callable[[int], None] | None = None
) -> int:
    """Re-encrypt every stored secret and header with the first key, so that older keys can be removed.

    Safe while the app and dispatchers run with the same keys: a value changed in the meantime is left alone.
    Can be stopped and started again.

    :param batch: rows per transaction.
    :param progress: called with the number of values done so far, after each transaction.
    :returns: how many values were re-encrypted.
    :raises DecryptionError: when no key can decrypt a value; values already re-encrypted stay that way.
    """
    done = 0
    tables: list[tuple[FromClause, str]] = [(Secret.__table__, "secret"), (Endpoint.__table__, "headers")]
    for table, name in tables:
        last: str | None = ""
        while last is not None:
            renewed, last = _rekey_batch(database, cipher, table, table.c[name], last, batch)
            done += renewed
            if progress is not None and renewed:
                progress(done)
    return done


def stored_samples(database: Database) -> list[str]:
    """Return encrypted values to test the keys with: the 20 oldest and 20 newest secrets and headers."""
    stored: list[str] = []
    with database.read() as connection:
        for column, key in ((Secret.secret, Secret.id), (Endpoint.headers, Endpoint.id)):
            for order in (key.asc(), key.desc()):
                query = select(column).where(column.is_not(None)).order_by(order).limit(20)
                stored += [text for text in connection.execute(query).scalars() if text is not None]
    return stored


def _rekey_batch(
    database: Database, cipher: Cipher, table: FromClause, column: ColumnElement[str], last: str, batch: int
) -> tuple[int, str | None]:
    assert isinstance(table, Table)  # noqa: S101 - for the type checker; FromClause cannot be updated
    with database.read() as connection:
        rows = connection.execute(
            select(table.c.id, column)
            .where(table.c.id > last, column.is_not(None))
            .order_by(table.c.id)
            .limit(batch)
        ).all()
    renewed = [(row_id, old, cipher.renew(old)) for row_id, old in rows]
    done = 0
    if renewed:
        with database.write() as connection:
            for row_id, old, new in renewed:
                change = update(table).where(table.c.id == row_id, column == old).values({column: new})
                done += connection.execute(change).rowcount
    return done, rows[-1][0] if len(rows) == batch else None


def _fernet_key(key: str | bytes) -> bytes:
    raw = key.encode() if isinstance(key, str) else key
    try:
        if len(raw) == 44 and len(base64.b64decode(raw, altchars=b"-_", validate=True)) == 32:
            return raw
    except binascii.Error:
        pass  # 44 characters of something else: a passphrase like any other
    derived = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_HKDF_INFO).derive(raw)
    return base64.urlsafe_b64encode(derived)
