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
