"""Encryption at rest: keys, rotation, and what a wrong key says."""

from __future__ import annotations

import pytest
from cryptography.fernet import Fernet

from flask_rq_webhooks.errors import ConfigurationError, DecryptionError
from flask_rq_webhooks.storage.crypto import Cipher


@pytest.mark.parametrize("text", ["s3cret", "", "✓ \x00 line\n", "x" * 5000], ids=repr)
@pytest.mark.parametrize(
    "key",
    ["a passphrase", Fernet.generate_key().decode(), "x" * 44, b"bytes"],
    ids=["words", "fernet", "44 characters", "bytes"],
)
def test_what_is_encrypted_comes_back(key: str | bytes, text: str) -> None:
    encrypted = Cipher([key]).encrypt(text)
    assert Cipher([key]).decrypt(encrypted) == text
    assert not text or text not in encrypted


def test_a_fernet_key_is_taken_as_it_is() -> None:
    key = Fernet.generate_key()
    assert Fernet(key).decrypt(Cipher([key.decode()]).encrypt("text")) == b"text"


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    old = Cipher(["old"]).encrypt("text")
    both = Cipher(["new", "old"])
    assert both.decrypt(old) == "text"
    with pytest.raises(DecryptionError):
        Cipher(["old"]).decrypt(both.encrypt("text"))
    assert Cipher(["new"]).decrypt(both.renew(old)) == "text"


@pytest.mark.parametrize("method", ["decrypt", "renew"])
@pytest.mark.parametrize("text", ["", "not encrypted", "gAAAAA=="])
def test_the_wrong_key_names_the_cure(method: str, text: str) -> None:
    text = text or Cipher(["other"]).encrypt("hush")
    with pytest.raises(DecryptionError) as caught:
        getattr(Cipher(["key"]), method)(text)
    message = str(caught.value)
    assert "RQ_WEBHOOKS_ENCRYPTION_KEYS" in message
    assert "SECRET_KEY_FALLBACKS" in message
    assert "Nothing is lost" in message
    assert "hush" not in message


def test_keys_of_an_app() -> None:
    by_secret_key = Cipher.from_config((), "secret").encrypt("text")
    assert Cipher.from_config((), "newer", ["secret"]).decrypt(by_secret_key) == "text"
    assert Cipher.from_config(("own",), "secret").decrypt(by_secret_key) == "text", (
        "introducing a key loses nothing"
    )
    assert Cipher(["own"]).decrypt(Cipher.from_config(("own",), "secret").encrypt("text")) == "text"


@pytest.mark.parametrize("secret_key", [None, "", b""])
def test_no_key_is_a_configuration_error(secret_key: str | bytes | None) -> None:
    with pytest.raises(ConfigurationError, match="SECRET_KEY"):
        Cipher.from_config((), secret_key)


def test_a_cipher_hides_its_keys() -> None:
    assert repr(Cipher(["very secret"])) == "<Cipher>"
