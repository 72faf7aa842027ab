"""Send one HTTP request to a receiver that may stall, flood, lie or redirect.

This package owns look-ups, connections, deadlines and size limits: every attempt ends within its deadline,
keeps a few kilobytes, and reaches only addresses that the policy accepted. It does not know events, SQL or
Redis. A :class:`Transport` is an object passed to the dispatcher; tests pass in another one. The modules:

==================== ===========================================================================
``contract``         what the dispatcher sees: request, result, the protocol of a transport, error codes
``client``           the transport: the loop and its threads, and the :mod:`requests` adapter
``pool``             opens connections, keeps them for reuse; TLS verification settings
``wire_format``      an exchange: writes a request, reads a response, and selects what is kept of it
``address_guard``    checks URLs and addresses; looks names up, opens connections
``deadline``         the total deadline of an attempt, and the watchdog that enforces it
==================== ===========================================================================
"""

from __future__ import annotations

from .address_guard import MAX_ADDRESSES, NAT64_WAIT_S, Lookups, Resolver, find_nat64, system_resolver
from .client import RequestsTransport, open_transport
from .contract import AttemptRequest, AttemptResult, Transport
from .pool import default_ssl_context
from .wire_format import BODY_CAP, KEPT_HEADERS, MAX_HEADER_BYTES

__all__ = [
    "BODY_CAP",
    "KEPT_HEADERS",
    "MAX_ADDRESSES",
    "MAX_HEADER_BYTES",
    "NAT64_WAIT_S",
    "AttemptRequest",
    "AttemptResult",
    "Lookups",
    "RequestsTransport",
    "Resolver",
    "Transport",
    "default_ssl_context",
    "find_nat64",
    "open_transport",
    "system_resolver",
]
