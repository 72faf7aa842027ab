"""What is said and how: events, payloads, signatures, retry decisions, URL and header rules.

Pure: no I/O, no Flask, no RQ, no SQL. Clock and resolver are handed in. Imports nothing of the
package but :mod:`flask_rq_webhooks.errors`.
"""
