"""Whom to believe over TLS."""

from __future__ import annotations

import ssl

from requests.utils import DEFAULT_CA_BUNDLE_PATH


def default_ssl_context(ca_file: str | None = None) -> ssl.SSLContext:
    """Return a context that verifies certificate and name, whatever the environment says.

    :param ca_file: PEM bundle instead of certifi's. ``ssl.create_default_context`` is not used since it
        obeys ``SSLKEYLOGFILE``, nor the system's store since it obeys ``SSL_CERT_FILE``.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cafile=ca_file or DEFAULT_CA_BUNDLE_PATH)
    return context


def verifying_context(context: ssl.SSLContext | None, ca_file: str | None) -> ssl.SSLContext:
    """Return *context*, or :func:`default_ssl_context` if there is none.

    :raises ValueError: for a context that would talk to anybody.
    """
    if context is None:
        return default_ssl_context(ca_file)
    if not context.check_hostname or context.verify_mode != ssl.CERT_REQUIRED:
        raise ValueError("The TLS context has to verify certificates and names.")
    return context
