"""How the bytes of one attempt travel, and what may come back.

Owns look-ups, connections, deadlines and caps. The receiver is a stranger who may stall, flood, lie or
redirect: every attempt ends within its deadline, keeps a few kilobytes, and reaches only addresses the
policy has seen. Knows nothing of events, retries, SQL or Redis.

A :class:`Transport` is an object handed to the dispatcher; tests hand in another one. Where to find what:

===================== ======================================================================================
``contract``          what the dispatcher sees: request, result, the protocol of a transport
``choosing``          which transport the settings ask for
``through_requests``  the default transport: threads and :mod:`requests` adapters
``through_aiohttp``   the transport of the extra ``fast``: one event loop
``loop``              its thread
``outgoing``          which headers are the connection's, whatever the request says
``answers``           what may come back: caps, kept headers, cleaning
``failures``          why there is no answer: the coarse codes
``destinations``      which URL and which address may be used: the policy, asked at every step
``lookups``           names to addresses, under a deadline
``tls``               whom to believe
``keeping``           how long a connection is kept
``attempt``           (threads) one attempt's deadlines, and the grip by which it is ended
``watchdog``          (threads) who ends it
``threads``           (threads) who makes it
``opening``           a connection to a judged address
``pinned``            (threads) connections, pools and adapter
``heads``             (threads) bounded status lines and headers
===================== ======================================================================================
"""

from __future__ import annotations

from .answers import BODY_CAP, KEPT_HEADERS, MAX_HEADER_BYTES
from .choosing import open_transport
from .client import RequestsTransport
from .contract import AttemptRequest, AttemptResult, Transport
from .dns import MAX_ADDRESSES, Resolver, system_resolver
from .tls import default_ssl_context

__all__ = [
    "BODY_CAP",
    "KEPT_HEADERS",
    "MAX_ADDRESSES",
    "MAX_HEADER_BYTES",
    "AttemptRequest",
    "AttemptResult",
    "RequestsTransport",
    "Resolver",
    "Transport",
    "default_ssl_context",
    "open_transport",
    "system_resolver",
]
