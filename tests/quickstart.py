"""The quickstart, done word for word: its files, its commands, its request; only ports and Redis are ours."""

from __future__ import annotations

import json
import re
import textwrap
from contextlib import ExitStack
from pathlib import Path

import requests

from tests.servers import ROOT, Process, free_port, wait_until

PAGE = (ROOT / "docs" / "quickstart.rst").read_text()
#: Where the page's receiver listens.
RECEIVER_PORT = "9000"


def files() -> dict[str, str]:
    """Return the page's files by name."""
    blocks = re.finditer(
        r"^\.\. code-block:: python\n    :caption: (\S+)\n\n((?:    .*\n|\n)+)", PAGE, re.MULTILINE
    )
    return {block[1]: textwrap.dedent(block[2]) for block in blocks}


def commands() -> list[list[str]]:
    """Return the page's commands, as words."""
    block = re.search(r"^\.\. code-block:: console\n\n((?:    \$ .*\n)+)", PAGE, re.MULTILINE)
    assert block is not None
    return [line.strip().removeprefix("$ ").split() for line in block[1].splitlines()]


def body() -> str:
    """Return what the page's request sends."""
    found = re.search(r"--json '(\{.*?\})'", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def follow(directory: Path, redis_url: str, *, python: str = "python", python_path: str) -> None:
    """Do what the page says and assert what it promises.

    :param directory: an empty one, for the page's files.
    :param python: the interpreter of the environment in which the package is.
    :param python_path: what its modules are searched on beside that environment.
    """
    app_port, receiver_port = str(free_port()), str(free_port())
    for name, content in files().items():
        (directory / name).write_text(content.replace(RECEIVER_PORT, receiver_port))
    environment = {
        "REDIS_URL": redis_url,
        "RQ_REDIS_URL": redis_url,
        "FLASK_RUN_PORT": app_port,
        "PYTHONPATH": f"{directory}:{python_path}".rstrip(":"),
    }
    init_db, *servers = commands()
    assert [server[0] for server in servers] == ["flask", "rq", "flask", "python"]
    module = {"flask": ["-m", "flask"], "rq": ["-m", "rq.cli"], "python": []}

    def start(words: list[str]) -> Process:
        return Process(python, *module[words[0]], *words[1:], env=environment, cwd=directory)

    with ExitStack() as cleanup:
        creating = cleanup.enter_context(start(init_db))
        assert creating.wait() == 0, creating.output
        web, worker, dispatcher, receiver = (cleanup.enter_context(start(server)) for server in servers)
        web.wait_for_output("Running on")
        worker.wait_for_output("istening on")
        wait_until(lambda: _listens(receiver_port), what="the receiver")

        request = body().replace(RECEIVER_PORT, receiver_port)
        url = f"http://127.0.0.1:{app_port}"
        response = requests.post(
            f"{url}/add", data=request, headers={"Content-Type": "application/json"}, timeout=10
        )
        assert response.headers["Webhook-Registered"] == "true", response.text
        receiver.wait_for_output("verified:")
        wait_until(lambda: "\n" in receiver.output.partition("verified:")[2], what="the whole line")
        payload = json.loads(receiver.output.split("verified:", 1)[1].splitlines()[0])
        assert payload["event"] == "job.success"
        assert payload["result"] == 5
        assert payload["job_id"] == response.json()["job_id"]

        status_url = f"{url}/webhooks/jobs/{payload['job_id']}"
        wait_until(lambda: requests.get(status_url, timeout=10).json()["delivery_status"] == "succeeded")
        assert dispatcher.popen.poll() is None


def _listens(port: str) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/", timeout=5).status_code == 501
    except requests.ConnectionError:
        return False
