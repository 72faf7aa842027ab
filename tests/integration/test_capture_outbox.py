"""The outbox stream on a real server: readers that come, die and come back, and writers nobody trusts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
import redis

from flask_rq_webhooks.queue import outbox as outbox_module
from flask_rq_webhooks.queue.outbox import GROUP, Entry, Outbox
from flask_rq_webhooks.queue.outbox_entry import confirm_entry

NAMESPACE = "nnnnnnnn"
KEY = f"rq_webhooks:outbox:ep{NAMESPACE}"
ENDPOINT = f"ep{NAMESPACE}_" + "0" * 26


@pytest.fixture(
    params=[
        {"protocol": 2},
        {"protocol": 3},
        {"protocol": 2, "decode_responses": True},
        {"protocol": 3, "decode_responses": True},
        {"protocol": 2, "socket_timeout": 0.2},
        "fakeredis",
    ],
    ids=lambda options: (
        options if isinstance(options, str) else " ".join(f"{k}={v}" for k, v in options.items())
    ),
)
def client(request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    if request.param == "fakeredis":
        connection: redis.Redis = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    else:
        connection = redis.Redis.from_url(request.getfixturevalue("redis_url"), **request.param)
    yield connection
    connection.close()


def append(box: Outbox, *job_ids: str) -> None:
    for job_id in job_ids:
        box.append(confirm_entry(ENDPOINT, [job_id]))


def jobs_of(entries: list[Entry]) -> list[str]:
    return [entry.entry.jobs[0] for entry in entries if entry.entry is not None]


def drain(box: Outbox, consumer: str = "reader") -> list[Entry]:
    entries = []
    while found := box.read(consumer, 10, 0):
        entries += found
    return entries


def pending(client: redis.Redis) -> int:
    return int(client.xpending(KEY, GROUP)["pending"])


def test_from_append_to_done(client: redis.Redis) -> None:
    box = Outbox(client, NAMESPACE, maxlen=1000)
    assert box.key == KEY
    assert box.read("reader", 10, 0) == []
    append(box, "a", "b", "c")
    assert box.length() == 3

    entries = box.read("reader", 2, 0)
    assert jobs_of(entries) == ["a", "b"]
    assert all(isinstance(entry.id, str) and entry.error is None for entry in entries)
    assert json.loads(entries[0].raw) == confirm_entry(ENDPOINT, ["a"])
    box.done(entry.id for entry in entries)
    box.done([])

    assert jobs_of(drain(box)) == ["c"]
    assert (box.length(), pending(client)) == (1, 1)


def test_what_a_reader_left_unfinished_comes_first_after_its_restart(client: redis.Redis) -> None:
    before = Outbox(client, NAMESPACE)
    append(before, *"abcdef")
    entries = before.read("reader", 4, 0)
    before.done([entries[1].id])

    after = Outbox(client, NAMESPACE)
    assert jobs_of(after.read("reader", 2, 0)) == ["a", "c"]
    assert jobs_of(after.read("reader", 2, 0)) == ["d"]
    assert jobs_of(after.read("reader", 10, 0)) == ["e", "f"]
    assert after.read("reader", 10, 0) == []


def test_two_living_readers_share(client: redis.Redis) -> None:
    one, two = Outbox(client, NAMESPACE), Outbox(client, NAMESPACE)
    append(one, *"abcd")
    assert jobs_of(one.read("one", 2, 0)) == ["a", "b"]
    assert jobs_of(two.read("two", 10, 0)) == ["c", "d"]
    assert one.read("one", 10, 0) == two.read("two", 10, 0) == []


def test_entries_of_a_dead_reader_are_taken_over(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "TAKE_OVER_IDLE_MS", 100)
    monkeypatch.setattr(outbox_module, "TAKE_OVER_EVERY_S", 0.05)
    dead, living = Outbox(client, NAMESPACE), Outbox(client, NAMESPACE)
    append(dead, *"abcde")
    taken = dead.read("dead", 4, 0)
    client.xdel(KEY, taken[3].id)  # trimmed meanwhile
    assert jobs_of(living.read("living", 10, 0)) == ["e"]

    time.sleep(0.2)
    found = living.read("living", 2, 0)
    found += living.read("living", 2, 0)

    assert jobs_of(found)[:3] == ["a", "b", "c"]
    living.done(entry.id for entry in found)
    assert "d" not in jobs_of(drain(living, "living"))


def test_entries_trimmed_after_they_were_read_are_forgotten(client: redis.Redis) -> None:
    before = Outbox(client, NAMESPACE)
    append(before, *"abc")
    taken = before.read("reader", 10, 0)
    client.xdel(KEY, taken[0].id, taken[1].id)

    after = Outbox(client, NAMESPACE)
    assert jobs_of(after.read("reader", 2, 0)) == ["c"]
    assert pending(client) == 1


def test_readers_gone_for_good_are_forgotten(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "FORGET_IDLE_MS", 50)
    append(Outbox(client, NAMESPACE), "a")
    assert len(Outbox(client, NAMESPACE).read("holds one", 10, 0)) == 1
    Outbox(client, NAMESPACE).read("holds none", 10, 0)
    time.sleep(0.2)
    Outbox(client, NAMESPACE).read("living", 10, 0)

    names = {consumer["name"] for consumer in client.xinfo_consumers(KEY, GROUP)}
    decoded = {name.decode() if isinstance(name, bytes) else name for name in names}
    assert "holds one" in decoded
    assert "holds none" not in decoded


def test_stream_or_group_deleted_while_reading(client: redis.Redis) -> None:
    box = Outbox(client, NAMESPACE)
    append(box, "a")
    assert jobs_of(box.read("reader", 10, 0)) == ["a"]

    client.delete(KEY)
    assert box.read("reader", 10, 0) == []
    append(box, "b")
    assert jobs_of(box.read("reader", 10, 0)) == ["b"]

    client.xgroup_destroy(KEY, GROUP)
    append(box, "c")
    assert jobs_of(box.read("reader", 10, 0)) == ["b", "c"]  # not acknowledged, so delivered again

    client.flushdb()
    append(box, "d")
    assert jobs_of(box.read("reader", 10, 0)) == ["d"]
    box.done(["1-1"])


def test_entry_written_before_the_first_reader_came(client: redis.Redis) -> None:
    append(Outbox(client, NAMESPACE), "a")
    assert jobs_of(Outbox(client, NAMESPACE).read("reader", 10, 0)) == ["a"]


def test_stream_is_capped(client: redis.Redis) -> None:
    box = Outbox(client, NAMESPACE, maxlen=100)
    append(box, *(str(number) for number in range(1000)))
    assert 100 <= box.length() < 400


def test_reading_waits_and_wakes(client: redis.Redis) -> None:
    box = Outbox(client, NAMESPACE)
    box.read("reader", 10, 0)
    started = time.monotonic()
    assert box.read("reader", 10, 5) == []
    assert 0.004 < time.monotonic() - started < 0.05  # servers themselves wait 100 ms at least
    started = time.monotonic()
    assert box.read("reader", 10, 80) == []
    assert time.monotonic() - started >= 0.07

    # Longer than the client's socket timeout, where it has one.
    for _round in range(5):
        assert box.read("reader", 10, 300) == []
    if isinstance(client, fakeredis.FakeRedis):
        return  # its blocking commands do not see other threads' writes in every release
    writer = threading.Timer(0.05, append, (box, "a"))
    writer.start()
    deadline = time.monotonic() + 5
    found: list[Entry] = []
    while not found and time.monotonic() < deadline:
        found = box.read("reader", 10, 5000)
    writer.join()
    assert jobs_of(found) == ["a"]


def test_stream_deleted_while_a_reader_waits(redis_client: redis.Redis) -> None:
    box = Outbox(redis_client, NAMESPACE)
    box.read("reader", 10, 0)
    timer = threading.Timer(0.1, redis_client.delete, (KEY,))
    timer.start()
    assert box.read("reader", 10, 1000) == []
    timer.join()
    append(box, "a")
    assert jobs_of(box.read("reader", 10, 0)) == ["a"]


# -- writers nobody trusts ----------------------------------------------------------------------------------

BAD: list[dict[Any, Any]] = [
    {"entry": b"\xff\xfe"},
    {"entry": b"{}"},
    {"entry": b"x" * (3 * 2**20)},
    {"other": "field"},
    {b"\xff": b"\xff"},
    {"entry": json.dumps(confirm_entry("epother000_" + "0" * 26, ["a"]))},
]


def test_bad_entries_do_not_hide_good_ones(client: redis.Redis) -> None:
    box = Outbox(client, NAMESPACE)
    for fields in BAD:
        client.xadd(KEY, fields)
    append(box, "good")

    entries = drain(box)

    assert jobs_of(entries) == ["good"]
    bad = entries[:-1]
    assert [entry.entry for entry in bad] == [None] * len(BAD)
    errors = [entry.error for entry in bad]
    assert errors == [
        "it is not JSON (UnicodeDecodeError).",
        "its version is None, this release reads 1.",
        "it has 3145728 bytes, more than 2097152.",
        "it has no field 'entry'",
        "it has no field 'entry'",
        f"its endpoint 'epother000_{'0' * 26}' belongs to another database.",
    ]


def test_rejected_entries_are_set_aside(client: redis.Redis) -> None:
    box = Outbox(client, NAMESPACE)
    for fields in BAD:
        client.xadd(KEY, fields)
    for entry in drain(box):
        box.reject(entry.id, entry.raw, entry.error or "")
    box.reject("1-1", "text with \ud800 and \u00e9", "because \ud800")

    assert (box.length(), pending(client)) == (0, 0)
    raw = redis.Redis(connection_pool=client.connection_pool).execute_command(
        "XRANGE", f"{KEY}:rejected", "-", "+", NEVER_DECODE=True
    )
    rejected = [dict(fields) for _id, fields in raw]
    assert [fields[b"entry"] for fields in rejected][:2] == [b"\xff\xfe", b"{}"]
    assert len(rejected[2][b"entry"]) == 65_536
    assert rejected[-1] == {
        b"id": b"1-1",
        b"entry": b"text with \\ud800 and \xc3\xa9",
        b"why": b"because \\ud800",
    }


def test_rejected_entries_are_capped(redis_client: redis.Redis) -> None:
    box = Outbox(redis_client, NAMESPACE)
    for number in range(1500):
        box.reject(f"1-{number + 1}", b"{}", "no")
    assert 1000 <= redis_client.xlen(f"{KEY}:rejected") < 1200


def test_two_databases_on_one_server_do_not_see_each_other(redis_client: redis.Redis) -> None:
    one, two = Outbox(redis_client, NAMESPACE), Outbox(redis_client, "mmmmmmmm")
    append(one, "a")
    assert two.read("reader", 10, 0) == []
    assert (one.length(), two.length()) == (1, 0)


def test_server_that_is_gone_raises_and_loses_nothing(redis_client: redis.Redis) -> None:
    gone = redis.Redis(host="127.0.0.1", port=1, socket_connect_timeout=0.5, retry=None)
    box = Outbox(gone, NAMESPACE)
    for call in (
        lambda: box.read("reader", 1, 0),
        lambda: box.append(confirm_entry(ENDPOINT, ["a"])),
        lambda: box.done(["1-1"]),
        box.length,
    ):
        with pytest.raises(redis.RedisError):
            call()
    gone.close()


def test_key_of_another_kind_is_reported(redis_client: redis.Redis) -> None:
    redis_client.set(KEY, "not a stream")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        Outbox(redis_client, NAMESPACE).read("reader", 1, 0)
