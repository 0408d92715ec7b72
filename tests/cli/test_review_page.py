"""The page of `fastlm review` in a real browser: two people at once, a server that is killed, connections that break."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, Page

pytest.importorskip("flask")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs chromium")]
LABELS = ("harmless", "hateful", "offensive")


class Server:
    """`fastlm review` in a process of its own."""

    def __init__(self, *words: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "fastlm", "review", *words, "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout
        lines = [self.process.stdout.readline() for _ in range(2)]
        assert lines[1].startswith("http://127.0.0.1:"), (lines, self.process.poll() and self.process.communicate())
        self.address = lines[1].strip()
        self.port = int(self.address.split(":")[2].split("/")[0])

    def end(self, with_signal: int = signal.SIGINT) -> tuple[int, str]:
        self.process.send_signal(with_signal)
        out, err = self.process.communicate(timeout=60)
        assert not err or with_signal == signal.SIGKILL, err
        return self.process.returncode, out


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


def entered(browser: Browser, address: str, name: str, **size: int) -> Page:
    page = browser.page(address, **size)
    page.wait("document.activeElement === $('name')")
    page.write(name)
    page.key("Enter")
    page.wait("!$('item').hidden")
    return page


def shown(page: Page) -> str:
    """The text on show; "" where the page says that nothing is left."""
    return str(
        page.wait("!$('item').hidden && held.length ? 'on ' + $('text').textContent : !$('done').hidden && 'end'")[3:]
    )


def tasks(path: Path, count: int) -> str:
    path.write_text(json.dumps([{"id": i, "data": {"text": f"text {i}"}} for i in range(count)]))
    return str(path)


def test_two_reviewers_and_a_kill_in_the_middle_lose_nothing_and_double_nothing(
    tmp_path: Path, browser: Browser
) -> None:
    words = [tasks(tmp_path / "tasks.json", 100), "--judges", "1", "--labels", *LABELS]
    server = Server(*words)
    people = {name: entered(browser, server.address, name) for name in ("Ann", "Bob")}
    said: dict[str, tuple[str, str, int, str | None]] = {}  # of each text who, label, thumb, better answer
    turn, going = 0, [*people]

    def judge(name: str, text: str) -> None:
        page, at = people[name], (turn * 7) % 3
        thumb, better = 0, None
        if turn % 10 == 3:
            page.key("+" if turn % 20 == 3 else "-")
            thumb = 1 if turn % 20 == 3 else -1
        if turn % 10 == 5:
            page.key("b")
            page.write(f", said better by {name}")
            better = f"{text}, said better by {name}"
            page.key("Escape")
        page.key(str(at + 1))
        assert text not in said
        said[text] = (name, LABELS[at], thumb, better)

    while going:
        name = going[turn % len(going)]
        text = shown(people[name])
        if not text:
            going.remove(name)
            continue
        judge(name, text)
        if turn % 10 == 8:  # back to it, and another label
            people[name].key("u")
            assert shown(people[name]) == text
            del said[text]
            judge(name, text)
        turn += 1
        if turn == 40:
            server.end(signal.SIGKILL)
            for one in people.values():  # on without the server: what the page holds can be judged
                while len(said) < 46 and one.js("held.length"):
                    judge(next(n for n, p in people.items() if p is one), shown(one))
                    turn += 1
            for one in people.values():
                one.wait("$('line').className === 'off'")
            server = Server(*words, port=server.port)
    for page in people.values():
        page.wait("!outbox.length && $('line').textContent === 'saved'")
        assert page.errors() == []
    code, out = server.end()
    assert code == 0
    assert "100 items, 100 judged" in out, out
    db = sqlite3.connect(tmp_path / "reviews.db")
    rows = db.execute(
        "SELECT data, reviewer, label, thumb, better FROM judgements JOIN items ON items.id = item"
    ).fetchall()
    assert {json.loads(data)["text"]: tuple(rest) for data, *rest in rows} == said
    assert len(rows) == len(said) == 100
    done = [row[0] for row in db.execute("SELECT action FROM audit WHERE reviewer <> ''")]
    assert done.count("judged") - done.count("undone") == 100
    assert "refused" not in done


def test_who_is_offline_goes_on_and_what_was_said_arrives_later_even_by_another_window(
    tmp_path: Path, browser: Browser
) -> None:
    server = Server(tasks(tmp_path / "tasks.json", 8), "--judges", "1")
    page = entered(browser, server.address, "Ann")
    page.wait("held.length === 4")
    offline: dict[str, Any] = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.ask("Network.enable", page.session)
    browser.ask("Network.emulateNetworkConditions", page.session, offline=True, **offline)
    for _ in range(3):
        page.key("1")
    page.wait("$('line').className === 'off' && $('line').textContent === 'no connection, 3 kept here'")
    page.js(
        "sessionStorage.clear(), outbox = [], who = ''"
    )  # the window is closed, still offline, and another one opened
    browser.ask(
        "Network.emulateNetworkConditions", page.session, offline=False, **(offline | dict.fromkeys(offline, -1))
    )
    page.js("location.reload()")
    page.wait("document.activeElement === $('name') && !who")
    page.write("Ann")
    page.key("Enter")
    page.wait("!outbox.length && $('line').textContent === 'saved' && progress.mine === 3")
    server.end()
    assert sqlite3.connect(tmp_path / "reviews.db").execute("SELECT count(*) FROM judgements").fetchone() == (3,)


def test_outputs_are_judged_by_thumbs_and_no_text_is_markup(tmp_path: Path, browser: Browser) -> None:
    nasty = '<img src=x onerror="document.title=1"> </script>\u202e'
    rows = [{"prompt": [{"role": "user", "content": nasty}], "completion": nasty}, {"prompt": nasty, "completion": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = Server(str(tmp_path / "rows.jsonl"))
    page = entered(browser, server.address, " Ann  B ")
    assert shown(page) == nasty
    assert page.js("$('prompt').textContent") == f"user{nasty}"
    assert page.js("$('labels').childElementCount") == 0
    page.key("+")  # a thumb alone is a judgement here
    page.wait("$('text').textContent === 'b'")
    page.key("b")
    page.write("\nmore")
    page.key("Enter", modifiers=2)
    page.wait("!$('done').hidden")
    page.key("u")
    page.wait("$('answer').value === 'b\\nmore'")
    page.key("Enter", modifiers=2) if page.js("document.activeElement === $('answer')") else page.key("Enter")
    page.wait("!$('done').hidden && !outbox.length")
    page.go("about:blank")
    page.go(server.address.replace("#", "#x"))
    assert "token" in page.wait("$('notice').textContent || (who && null)")
    assert page.errors() == []
    server.end()
    found = (
        sqlite3.connect(tmp_path / "reviews.db").execute("SELECT reviewer, thumb, better FROM judgements").fetchall()
    )
    assert found == [("Ann B", 1, None), ("Ann B", 0, "b\nmore")]


def test_another_page_of_the_browser_cannot_write(tmp_path: Path, browser: Browser) -> None:
    server = Server(tasks(tmp_path / "tasks.json", 2))
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/index.html").write_text("<p>evil</p>")
    command = [
        sys.executable,
        "-u",
        "-m",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(tmp_path / "evil"),
    ]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert other.stdout
    port = other.stdout.readline().split("port ")[1].split()[0]
    page = browser.page(f"http://127.0.0.1:{port}/")
    token = server.address.partition("#")[2]
    body = json.dumps({"reviewer": "evil", "window": "w", "request": "1", "item": 1, "label": "harmful"})
    for headers in ({"Content-Type": "text/plain"}, {"X-Fastlm-Token": token, "Content-Type": "application/json"}):
        for mode in ("cors", "no-cors"):
            page.js(
                f"fetch('http://127.0.0.1:{server.port}/api/judge', {{method: 'POST', mode: '{mode}', body: {body!r}, "
                f"headers: {json.dumps(headers)}}}).then(() => 1, () => 2)"
            )
    os.kill(other.pid, signal.SIGTERM)
    other.wait()
    server.end()
    db = sqlite3.connect(tmp_path / "reviews.db")
    assert db.execute("SELECT count(*) FROM judgements").fetchone() == (0,)
