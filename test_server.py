"""What the chat promises, one class for each kind of promise.  `python -m unittest` runs all of it.

Everything here is real: sockets, server processes, a browser.  The tests of the page want Playwright and Chromium, and two
files from the npm registry; those of the README want Caddy and Redis.  What is absent is skipped, with a word on how to get
it; `.ci/run` gets everything, and with CI=true nothing is skipped.
"""
import asyncio
import base64
import collections
import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
from unittest import mock

from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.testing import AsyncHTTPTestCase, gen_test
from tornado.websocket import websocket_connect

import server

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None

HERE = pathlib.Path(__file__).resolve().parent
MODULES = HERE / ".ci/node_modules"
WAIT = 10  # seconds after which something that should come counts as lost
LONGEST = {"nick": "n" * 30, "message": "\x01" * 1000}  # no line takes more bytes: six for each control character


def need(there, what, how):
    """Skip a test, saying how to enable it, where something is absent; with CI=true, fail."""
    if not there:
        if os.environ.get("CI") == "true":
            raise AssertionError(f"{what} is absent, and with CI=true nothing may be skipped")
        raise unittest.SkipTest(f"{what} is absent. To run this test: {how}")


def say(message, nick="Ann", **more):
    return {"type": "new_message", "nick": nick, "message": message, **more}


def lines_in(frame):
    """Return the lines in a frame from the server, as the post's page reads it: a list has several, others are one."""
    return frame["data"] if frame["type"] == "list" else [frame]


# ---- Tools: a client in the test's own event loop, a client on a bare socket, a server process ----------------------


class Client:
    """A client in the test's event loop, on Tornado's own WebSocket client."""

    def __init__(self, connection):
        self.connection, self.lines = connection, collections.deque()

    async def frame(self):
        data = await asyncio.wait_for(self.connection.read_message(), WAIT)
        return data if data is None else json.loads(data)

    async def hear(self):
        """Return the next line."""
        while not self.lines:
            frame = await self.frame()
            if frame is None:
                raise AssertionError(f"closed: {self.connection.close_code} {self.connection.close_reason}")
            self.lines.extend(lines_in(frame))
        return self.lines.popleft()

    async def hear_until(self, message):
        """Return all lines up to the one with this message."""
        heard = [await self.hear()]
        while heard[-1]["message"] != message:
            heard.append(await self.hear())
        return heard

    async def say(self, data):
        await self.connection.write_message(data if isinstance(data, bytes | str) else json.dumps(data),
                                            binary=isinstance(data, bytes))


class RoomTest(AsyncHTTPTestCase):
    """The real application, listening on a free port, in the test's event loop."""

    def get_app(self):
        return server.application

    def setUp(self):
        super().setUp()
        self.clients = []
        for collection in server.connections, server.messages, server.outbox:
            collection.clear()

    def tearDown(self):
        for client in self.clients:
            client.connection.close()
        self.io_loop.run_sync(lambda: asyncio.sleep(0.01))
        super().tearDown()

    async def connect(self, **headers):
        request = HTTPRequest(self.get_url("/chat").replace("http", "ws"), headers=headers)
        client = Client(await websocket_connect(request))
        self.clients.append(client)
        return client

    async def join(self, nick):
        client = await self.connect()
        await client.frame()
        await client.say({"type": "join", "nick": nick})
        self.assertEqual((await client.hear())["message"], f"{nick} joined")
        return client


def masked(payload, opcode=1, fin=True, rsv=0, mask=b"abcd"):
    """Return a frame as RFC 6455, 5.2 has it from a client; mask=None leaves the mask out."""
    payload = payload.encode() if isinstance(payload, str) else payload
    first, bit, size = fin << 7 | rsv << 4 | opcode, (mask is not None) << 7, len(payload)
    if size < 126:
        head = struct.pack("!BB", first, bit | size)
    elif size < 65536:
        head = struct.pack("!BBH", first, bit | 126, size)
    else:
        head = struct.pack("!BBQ", first, bit | 127, size)
    if mask is None:
        return head + payload
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


class BareClient:
    """A client on a bare socket, for what a well-behaved one would not do."""

    KEY = "dGhlIHNhbXBsZSBub25jZQ=="

    def __init__(self, port, nick=None, small_buffer=False, path="/chat"):
        self.socket = socket.socket()
        self.socket.settimeout(WAIT)
        if small_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nUpgrade: websocket\r\n"
                            f"Connection: Upgrade\r\nSec-WebSocket-Key: {self.KEY}\r\n"
                            "Sec-WebSocket-Version: 13\r\n\r\n".encode())
        self.reader = self.socket.makefile("rb")
        self.status = self.reader.readline().decode()
        for header in self.reader:
            if not header.strip():
                break
        self.lines, self.heard = collections.deque(), []
        if nick:
            self.frame()
            self.say({"type": "join", "nick": nick})

    def send(self, data):
        self.socket.sendall(data)

    def say(self, data):
        self.send(masked(json.dumps(data, ensure_ascii=False)))

    def frame(self):
        """Return the opcode and the payload of the next frame, (None, b"") where the connection has ended."""
        try:
            head = self.reader.read(2)
            if len(head) < 2:
                return None, b""
            size = head[1]
            if size > 125:
                size = int.from_bytes(self.reader.read(2 if size == 126 else 8), "big")
            return head[0] & 15, self.reader.read(size)
        except ConnectionError:
            return None, b""

    def hear(self):
        """Return the next line."""
        while not self.lines:
            opcode, payload = self.frame()
            if opcode == 9:
                self.send(masked(payload, opcode=10))
            elif opcode == 1:
                self.lines.extend(lines_in(json.loads(payload)))
            else:
                raise AssertionError(f"no line, but opcode {opcode} {payload!r}")
        self.heard.append(self.lines.popleft())
        return self.heard[-1]

    def hear_until(self, message):
        """Return all lines up to the one with this message."""
        heard = [self.hear()]
        while heard[-1]["message"] != message:
            heard.append(self.hear())
        return heard

    def closing(self):
        """Return the code of the close frame that comes, or None where the connection ends without one."""
        while True:
            opcode, payload = self.frame()
            if opcode == 8:
                return int.from_bytes(payload[:2], "big")
            if opcode is None:
                return None

    def vanish(self):
        """End the connection with a reset, as a machine does that has crashed."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.reader.close()
        self.socket.close()


class ServerProcess:
    """`python server.py`, or another script that ends in the same way, on a free port."""

    def __init__(self, *options, port=0, script=HERE / "server.py", files=None, **more):
        self.log_file = tempfile.TemporaryFile("w+")
        limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
        self.process = subprocess.Popen(
            [sys.executable, script, f"--port={port}", *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=self.log_file, text=True, preexec_fn=limit, **more)
        self.greeting = self.process.stdout.readline()
        found = re.search(r"http://\S+:(\d+)/", self.greeting)
        self.port = int(found[1]) if found else None
        self.url = f"http://localhost:{self.port}/"

    def log(self):
        self.log_file.seek(0)
        return self.log_file.read()

    def stop(self, signum=signal.SIGTERM):
        """Stop it; return its exit status and what it wrote to its log."""
        self.process.send_signal(signum)
        try:
            return self.process.wait(WAIT), self.log()
        finally:
            self.process.kill()
            self.process.stdout.close()
            self.log_file.close()

    def memory(self):
        """Return the most memory that it has held so far, in MiB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024


class ProcessTest(unittest.TestCase):
    """A server process for each test, which must end well and leave an empty log."""

    options, files = (), None

    def setUp(self):
        self.server = ServerProcess(*self.options, files=self.files)
        self.addCleanup(lambda: self.assertEqual(self.server.stop(), (0, "")))

    def client(self, nick=None, **more):
        client = BareClient(self.server.port, nick, **more)
        self.addCleanup(client.socket.close)
        self.addCleanup(client.reader.close)
        return client


# ---- The promises -----------------------------------------------------------------------------------------------------


class EverybodyHearsEverything(RoomTest):
    """The wire format, the history, and what becomes of a line."""

    @gen_test
    async def test_a_newcomer_gets_the_history(self):
        ann = await self.connect()
        self.assertEqual(await ann.frame(), {"type": "list", "data": [], "online": 1})
        await ann.say(say("hi"))
        said = await ann.frame()
        bob = await self.connect()
        self.assertEqual(await bob.frame(), {"type": "list", "data": [said], "online": 2})

    @gen_test
    async def test_a_message_reaches_everybody_once_and_is_stored_once(self):
        clients = [await self.join(nick) for nick in ("Ann", "Bob", "Cleo")]
        await clients[0].say(say("hi", id="k3j9x"))
        await clients[1].say(say("the end", nick="Bob"))
        for client in clients:
            said = [line for line in await client.hear_until("the end") if "nick" in line]
            self.assertEqual([line["message"] for line in said], ["hi", "the end"])
            self.assertAlmostEqual(said[0].pop("time"), time.time(), delta=60)
            self.assertEqual(said[0], {"type": "message", "id": "k3j9x", "nick": "Ann", "message": "hi"})
        self.assertEqual([line["message"] for line in server.messages], ["hi", "the end"])

    @gen_test
    async def test_who_gives_no_id_gets_one(self):
        ann = await self.join("Ann")
        await ann.say(say("one"))
        await ann.say(say("two"))
        one, two = await ann.hear(), await ann.hear()
        self.assertNotEqual(one["id"], two["id"])

    @gen_test
    async def test_joining_and_leaving_is_told_but_not_stored(self):
        ann = await self.join("Ann")
        bob = await self.join("Bob")
        joined = await ann.hear()
        self.assertAlmostEqual(joined.pop("time"), time.time(), delta=60)
        self.assertEqual(joined, {"type": "message", "message": "Bob joined", "online": 2})
        bob.connection.close()
        left = await ann.hear()
        self.assertEqual((left["message"], left["online"]), ("Bob left", 1))
        self.assertFalse(server.messages)

    @gen_test
    async def test_the_history_is_bounded(self):
        ann = await self.join("Ann")
        for i in range(server.HISTORY + 20):
            await ann.say(say(str(i)))
            await ann.hear()
        history = (await (await self.connect()).frame())["data"]
        self.assertEqual([line["message"] for line in history], [str(i) for i in range(20, server.HISTORY + 20)])

    @gen_test
    async def test_a_line_that_is_sent_again_is_not_said_again(self):
        ann, bob = await self.join("Ann"), await self.join("Bob")
        for _ in range(3):
            await ann.say(say("once", id="1"))
        await bob.say(say("once", nick="Bob", id="1"))
        await bob.say(say("the end", nick="Bob"))
        for client in ann, bob:
            heard = [line["message"] for line in await client.hear_until("the end") if "nick" in line]
            self.assertEqual(heard, ["once", "the end"])

    @gen_test
    async def test_who_joins_between_broadcast_and_flush_gets_the_line_once(self):
        original = server.WSHandler.open

        def open_at_that_moment(handler):
            server.broadcast(server.line("hi", id="1", nick="Ann"))
            original(handler)

        with mock.patch.object(server.WSHandler, "open", open_at_that_moment):
            bob = await self.connect()
        await bob.say(say("the end"))
        self.assertEqual([line["message"] for line in await bob.hear_until("the end")], ["hi", "the end"])

    @gen_test
    async def test_lines_that_arrive_together_leave_in_one_frame_and_in_order(self):
        clients = [await self.connect() for _ in range(30)]
        for client in clients:
            await client.frame()
        for i in range(5):
            for number, client in enumerate(clients):
                client.connection.write_message(json.dumps(say(f"{number} {i}")))
        orders, most = [], 0
        for client in clients:
            heard = []
            while len(heard) < 150:
                heard.append([line["message"] for line in lines_in(await client.frame())])
                most = max(most, len(heard[-1]))
                if sum(map(len, heard)) == 150:
                    break
            self.assertLessEqual(len(heard), 50)  # frames: had each line its own, there would be 150
            orders.append([message for frame in heard for message in frame])
        self.assertEqual(most, 30)  # one line of each client in a flush, not more
        for order in orders:
            self.assertEqual(order, orders[0])
        for number in range(30):
            mine = [message for message in orders[0] if message.split()[0] == str(number)]
            self.assertEqual(mine, [f"{number} {i}" for i in range(5)])

    @gen_test
    async def test_the_posts_own_page_can_chat(self):
        """Its frames have no id; it never joins; it understands `list`, and else shows the `message`."""
        ann, shown = await self.connect(), []
        for _ in range(2):
            await ann.say('{"type":"new_message","nick":"Ann","message":"hello"}')
        while len(shown) < 2:
            data = await ann.frame()
            for entry in data["data"] if data["type"] == "list" else [data]:
                shown.append((entry["nick"] + ": " if entry.get("nick") else "") + entry["message"])
        self.assertEqual(shown, ["Ann: hello"] * 2)
        await ann.say('{"type":"new_message","nick":"","message":"hello"}')  # it lets people post without a nick
        self.assertIn("nick", (await ann.frame())["message"])


class BadInputGetsAnAnswer(RoomTest):
    """In words, to its sender alone, on a connection that stays open."""

    BAD = {
        "hello": "JSON", "": "JSON", "{": "JSON", '"text"': "JSON", "[]": "JSON", "3": "JSON", "null": "JSON",
        "[" * 8000: "JSON", '{"a":' * 1300: "JSON", "9" * 8000: "JSON", '{"type":' + "9" * 8000 + "}": "JSON",
        b"\x00\xff": "text", b'{"type": "join", "nick": "Ann"}': "text",
        "{}": "type", '{"type": "list", "data": []}': "type", '{"type": null}': "type", '{"type": ["join"]}': "type",
        '{"type": "join"}': "nick", '{"type": "new_message", "message": "hi"}': "nick",
        '{"type": "new_message", "nick": "Ann"}': "message",
        **{json.dumps({"type": "join", "nick": nick}): "nick"
           for nick in (None, 3, [], {}, True, "", "  ", "n" * 31, "\u2003")},
        **{json.dumps(say("hi", nick=nick)): "nick" for nick in (None, 1.5, ["Ann"], "", "\t", "n" * 31)},
        **{json.dumps(say(message)): "message" for message in (None, 7, ["hi"], {"a": 1}, "", " \n ", "m" * 1001)},
        **{json.dumps(say("hi", id=id)): "id" for id in (None, 7, "", " ", "i" * 65, [], {})},
    }

    @gen_test
    async def test_every_kind(self):
        ann, bob = await self.join("Ann"), await self.connect()
        await bob.frame()
        for bad, word in self.BAD.items():
            with self.subTest(bad[:60]):
                await bob.say(bad)
                answer = await bob.frame()
                self.assertEqual((set(answer), answer["type"]), ({"type", "message"}, "error"))
                self.assertIn(word, answer["message"])
        await bob.say(say("still here", nick="Bob"))
        self.assertEqual((await ann.hear())["message"], "still here")
        self.assertEqual(len(server.messages), 1)

    @gen_test
    async def test_the_longest_that_is_allowed(self):
        ann = await self.join("n" * 30)
        for line in say("m" * 1000, nick=f"  {'n' * 30} ", id="i" * 64), say("😀" * 1000, nick="😀" * 30, id="2"):
            await ann.say(json.dumps(line, ensure_ascii=False))
            heard = await ann.hear()
            self.assertEqual((heard["message"], heard["nick"], heard["id"]),
                             (line["message"], line["nick"].strip(), line["id"]))

    @gen_test
    async def test_only_checked_fields_are_relayed(self):
        ann = await self.join("Ann")
        await ann.say(say("hi", id="1", time=0, online=99, data=[1], html="<b>", type_="list"))
        heard = await ann.hear()
        self.assertEqual(set(heard), {"type", "id", "nick", "message", "time"})
        self.assertGreater(heard["time"], 1e9)

    @gen_test
    async def test_who_has_joined_cannot_join_again(self):
        ann = await self.join("Ann")
        await ann.say({"type": "join", "nick": "Bob"})
        self.assertEqual((await ann.hear())["type"], "error")

    @gen_test
    async def test_unicode_that_breaks_naive_code(self):
        ann, bob = await self.join("Ann"), await self.join("Bob")
        await ann.hear()
        for there, here in [("\x00", "\x00"), ("a\u2028\u2029b", "a\u2028\u2029b"), ("\u202eabc", "\u202eabc"),
                            ("</script>", "</script>"), ("\ud800", "?"), ("\udfff\ud800", "??"), ("e\u0301", "e\u0301")]:
            await ann.say(say(there, nick="A" + there))
            for client in ann, bob:
                heard = await client.hear()
                self.assertEqual((heard["message"], heard["nick"]), (here, "A" + here))


class HTTPGetsTheRightStatus(RoomTest):
    def status(self, path, method="GET", **headers):
        return self.fetch(path, method=method, headers=headers, allow_nonstandard_methods=True)

    def test_statuses(self):
        self.assertEqual(self.status("/").code, 200)
        self.assertEqual(self.status("/?nick=Ann").code, 200)
        self.assertEqual(self.status("/chat").code, 400)
        self.assertEqual(self.status("/nowhere").code, 404)
        self.assertEqual(self.status("/server.py").code, 404)
        for method in "POST", "PUT", "DELETE":
            self.assertEqual(self.status("/", method).code, 405)
            self.assertEqual(self.status("/chat", method).code, 405)
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": BareClient.KEY}
        self.assertEqual(self.status("/chat", **upgrade, **{"Sec-WebSocket-Version": "12"}).code, 426)

    @gen_test
    async def test_pages_of_other_sites_are_kept_out(self):
        with self.assertRaises(HTTPClientError) as caught:
            await self.connect(Origin="https://evil.example")
        self.assertEqual(caught.exception.code, 403)
        await (await self.connect(Origin=self.get_url("").rstrip("/"))).frame()

    def test_the_page(self):
        pages = [self.fetch("/") for _ in range(2)]
        self.assertRegex(pages[0].body.decode(), r'id="nick" value="User\d+"')
        policies = [page.headers["Content-Security-Policy"] for page in pages]
        for page, policy in zip(pages, policies, strict=True):
            nonce = re.search(r"script-src 'nonce-([^']+)'", policy)[1]
            self.assertEqual(page.body.decode().count(f'nonce="{nonce}"'), 2)
            self.assertIn("default-src 'none'", policy)
            self.assertIn("connect-src 'self'", policy)
            self.assertNotIn("unsafe", policy)
            self.assertIn(re.search(r'<script src="([^"]+)"', page.body.decode())[1], policy)
        self.assertNotEqual(*policies)


class OneCannotHurtTheOthers(ProcessTest):
    """Strangers on the network, against a server process.  Its log must stay empty."""

    def test_protocol_abuse_closes_that_connection_alone(self):
        ann = self.client("Ann")
        ann.hear()
        hello = json.dumps(say("abuse"))
        abuses = {
            "reserved bits": masked(hello, rsv=4),
            "no mask": masked(hello, mask=None),
            "no mask, after a frame with one": masked("{}") + masked(hello, mask=None),
            "oversized": masked("x" * 8193),
            "oversized, by its header alone": struct.pack("!BBQ", 0x81, 0xff, 1 << 62),
            "bad UTF-8": masked(b"\xff\xfe"),
            "endless fragments": masked("x", fin=False) + masked("x" * 100, opcode=0, fin=False) * 100,
            "a continuation of nothing": masked(hello, opcode=0),
            "a message within a message": masked("a", fin=False) + masked(hello),
            "unknown opcode": masked(hello, opcode=3),
            "a control frame in fragments": masked("", opcode=9, fin=False),
            "a long control frame": masked("x" * 126, opcode=9),
            "a close frame with bad UTF-8": masked(b"\x03\xe8\xff\xff", opcode=8),
            "a close frame of one byte": masked(b"\x03", opcode=8),
            "no WebSocket at all": b"\x16\x03\x01\x02\x00" * 50,
        }
        for what, data in abuses.items():
            with self.subTest(what):
                client = self.client()
                with contextlib.suppress(ConnectionError):
                    client.send(data)
                client.closing()
        ann.say(say("still here"))
        self.assertEqual([line["message"] for line in ann.hear_until("still here")], ["still here"])

    def test_one_that_stops_reading_is_cut_off_and_costs_little(self):
        sleepy = self.client("Sleepy", small_buffer=True)
        readers = [self.client("Ann"), self.client("Bob")]
        readers[0].hear_until("Bob joined")
        before, heard, left = self.server.memory(), [], False
        for i in range(3000):
            readers[0].say(say(LONGEST["message"] if i % 2 else "😀" * 1000, id=str(i)))
            line = readers[0].hear()
            if "nick" not in line:
                self.assertEqual(line["message"], "Sleepy left")
                left = True
                line = readers[0].hear()
            heard.append(line["id"])
            if left:
                break
        self.assertTrue(left, "it holds on to what it does not read")
        self.assertEqual(heard, [str(i) for i in range(len(heard))])
        readers[1].say(say("the end"))
        others = [line["id"] for line in readers[1].hear_until("the end") if "id" in line]
        self.assertEqual(others[:len(heard)], heard)
        self.assertLess(self.server.memory() - before, 20)
        sleepy.socket.close()

    def test_a_crowd_that_posts_the_longest_lines_at_once_cuts_nobody_off(self):
        crowd = [self.client() for _ in range(250)]  # 1.5 MB in one breath: more than may wait for a client
        for client in crowd:
            client.frame()
        for i, client in enumerate(crowd):
            client.say({"type": "new_message", "id": str(i), **LONGEST})
        for client in crowd:
            self.assertEqual(sorted(int(client.hear()["id"]) for _ in crowd), list(range(250)))
        newcomer = self.client()
        self.assertEqual(sum(client.hear()["nick"] == LONGEST["nick"] for client in [newcomer] * 100), 100)
        newcomer.say(say("in"))
        self.assertEqual(newcomer.hear()["message"], "in")

    def test_one_that_floods_gets_one_line_into_each_flush(self):
        flooder, ann = self.client("Flooder"), self.client("Ann")
        ann.hear_until("Ann joined")
        flood = b"".join(masked(json.dumps(say(str(i), nick="Flooder"))) for i in range(2000))
        threading.Thread(target=flooder.send, args=[flood], daemon=True).start()
        threading.Thread(target=lambda: [flooder.frame() for _ in range(1000)], daemon=True).start()
        heard = []
        while len(heard) < 2000:
            opcode, payload = ann.frame()
            batch = [line["message"] for line in lines_in(json.loads(payload)) if line.get("nick") == "Flooder"]
            self.assertLessEqual(len(batch), 1)
            heard += batch
        self.assertEqual(heard, [str(i) for i in range(2000)])

    def test_one_that_vanishes_is_noticed(self):
        ann = self.client("Ann")
        for i in range(10):
            ghost = self.client(f"Ghost {i}")
            for _ in range(20):
                ann.say(say("x" * 900))
            ghost.vanish()
            ann.say(say("boo"))
            ann.hear_until(f"Ghost {i} left")
        for _ in range(50):  # gone before the handshake is over
            stranger = socket.create_connection(("127.0.0.1", self.server.port))
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stranger.sendall(b"GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             b"Sec-WebSocket-Key: a\r\nSec-WebSocket-Version: 13\r\n\r\n")
            stranger.close()
        ann.say(say("still here"))
        ann.hear_until("still here")


class TheSilentAreNoticed(RoomTest):
    def get_app(self):
        server.application.settings["websocket_ping_interval"] = 0.2
        self.addCleanup(server.application.settings.update, websocket_ping_interval=server.PATIENCE)
        return server.application

    @gen_test
    async def test_one_that_answers_no_ping_is_closed(self):
        loop, ann = asyncio.get_running_loop(), await self.join("Ann")
        silent = await loop.run_in_executor(None, BareClient, self.get_http_port(), "Silent")
        self.assertEqual(await loop.run_in_executor(None, silent.closing), 1000)
        silent.vanish()
        await ann.hear_until("Silent left")


class MoreClientsThanFiles(ProcessTest):
    files = 64

    def test_newcomers_are_refused_and_come_in_when_there_is_room(self):
        room = [self.client("Ann")]
        while room[-1].status.startswith("HTTP/1.1 101"):
            self.assertLess(len(room), 64)
            room.append(self.client())
        self.assertGreater(len(room), 30)
        room.pop()
        for _ in range(100):
            self.assertTrue(self.client().status.startswith("HTTP/1.1 503"))
        with self.assertRaises(urllib.error.HTTPError) as caught, urllib.request.urlopen(self.server.url):
            pass
        self.assertEqual(caught.exception.code, 503)
        self.assertIn("full", caught.exception.read().decode())
        room[0].say(say("we talk on"))
        room[0].hear_until("we talk on")
        room[1].frame()
        room[1].hear_until("we talk on")

        for client in room[-5:]:
            client.vanish()
        while True:  # the server sees them go one by one
            newcomer = self.client()
            if newcomer.status.startswith("HTTP/1.1 101"):
                break
        newcomer.say(say("in"))
        room[0].hear_until("in")


class ItStartsAndStops(unittest.TestCase):
    def run_server(self, *options):
        return subprocess.run([sys.executable, HERE / "server.py", *options], capture_output=True, text=True, timeout=WAIT)

    def test_it_serves_from_any_folder_on_localhost_and_says_where(self):
        with tempfile.TemporaryDirectory() as elsewhere:
            process = ServerProcess(cwd=elsewhere)
            self.addCleanup(process.stop)
            self.assertIn(f"http://localhost:{process.port}/", process.greeting)
            with urllib.request.urlopen(process.url) as page:
                self.assertIn("Welcome to ScopyChat", page.read().decode())
            listening = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True).stdout
            self.assertNotIn(f"00000000:{process.port:04X} 00000000:0000 0A", listening)

    def test_other_addresses(self):
        for address, host in ("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("::1", "[::1]"):
            process = ServerProcess("--address", address)
            self.assertIn(f"http://{host}:{process.port}/", process.greeting)
            with urllib.request.urlopen(f"http://{host}:{process.port}/") as page:
                self.assertEqual(page.status, 200)
            self.assertEqual(process.stop(signal.SIGINT), (0, ""))

    def test_wrong_options_get_a_clear_line(self):
        for options, word in [(["--port", "x"], "'x'"), (["--port", "99999"], "--port"), (["--port=-1"], "--port"),
                              (["--prot", "1"], "--prot"), (["--address", "nowhere.invalid"], "nowhere.invalid"),
                              (["--address", ".."], "..")]:
            with self.subTest(options):
                done = self.run_server(*options)
                self.assertGreater(done.returncode, 0)
                self.assertIn(word, done.stderr.splitlines()[-1])
                self.assertNotIn("Traceback", done.stderr)

    def test_a_port_in_use_gets_a_clear_line(self):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = str(other.getsockname()[1])
            done = self.run_server("--port", port)
        self.assertGreater(done.returncode, 0)
        self.assertEqual(len(done.stderr.splitlines()), 1)
        self.assertIn(port, done.stderr)

    def test_help(self):
        self.assertIn("--address", self.run_server("--help").stdout)

    def test_its_metadata_names_python_and_tornado(self):
        """PEP 723, for `uv run server.py`."""
        found = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", (HERE / "server.py").read_text())
        self.assertIn('requires-python = ">=3.11"', found["content"])
        self.assertIn("tornado", found["content"])

    def test_a_signal_ends_it_with_a_goodbye_even_if_somebody_does_not_answer(self):
        for signum in signal.SIGTERM, signal.SIGINT:
            process = ServerProcess()
            clients = [BareClient(process.port, f"Ann {i}") for i in range(20)]
            deaf = BareClient(process.port, "Deaf", small_buffer=True)
            silent = socket.create_connection(("127.0.0.1", process.port))
            for client in clients:
                client.hear_until("Deaf joined")
            for i in range(500):
                clients[i % 20].say(say("x" * 900, id=str(i)))
            clients[0].hear()
            process.process.send_signal(signum)
            for client in clients:
                with self.assertRaisesRegex(AssertionError, r"opcode 8 b'\\x03\\xe9the server stops"):
                    while client.hear():
                        pass
                with contextlib.suppress(ConnectionError):
                    client.send(masked(b"\x03\xe9", opcode=8))
            said = [[line["id"] for line in client.heard if "id" in line] for client in clients]
            self.assertGreater(len(said[0]), 0)
            self.assertEqual(said, [said[0]] * 20)  # what one was sent, all were sent
            self.assertEqual(process.stop(signum), (0, ""))
            for client in [*clients, deaf]:
                client.vanish()
            silent.close()


class WhatWasAcceptedIsDelivered(RoomTest):
    @gen_test
    async def test_the_outbox_is_flushed_before_the_goodbye(self):
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        with mock.patch.object(sys, "argv", ["server.py", "--port=0"]), mock.patch("builtins.print"):
            running = asyncio.ensure_future(server.main())
            await asyncio.sleep(0.1)
        ann = await self.join("Ann")
        server.broadcast(server.line("the last words", id="1", nick="Bob"))
        os.kill(os.getpid(), signal.SIGTERM)
        self.assertEqual((await ann.hear())["message"], "the last words")
        self.assertIsNone(await ann.frame())
        self.assertEqual(ann.connection.close_code, 1001)
        await running
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    unittest.main()
