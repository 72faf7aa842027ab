"""What is sent: the dispatcher's side of the pipeline, and the only HTTP sender of the package.

In the order the data flows: :mod:`ingest` turns callbacks' words into events, told by :mod:`telling`;
:mod:`sender` claims what is due, :mod:`sending` makes the request of it, :mod:`transport` carries the bytes,
and :mod:`recorder` notes what came back. :mod:`dispatcher` is the process around them. Knows nothing of the
host's requests.
"""
