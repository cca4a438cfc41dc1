"""What the chat promises, one class for each kind of promise.  `python -m unittest` runs all of it.

Everything here is real: sockets, server processes, a browser.  The tests of the page want Playwright and Chromium, and two
files from the npm registry; those of the README want Caddy and Redis.  What is absent is skipped, with a word on how to get
it; `.ci/run` gets everything, and with CI=true nothing is skipped.
"""
import asyncio
import collections
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
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
        server.flushing = None

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

    def flood(self, data):
        """Send more than will be taken."""
        with contextlib.suppress(OSError):
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
        return self.finish()

    def finish(self):
        """Wait for its end; return its exit status and what it wrote to its log."""
        try:
            select.select([self.process.stdout], [], [], WAIT)  # until it ends; wait() alone looks now and then
            return self.process.wait(WAIT), self.log()
        finally:
            self.process.kill()
            self.process.stdout.close()
            self.log_file.close()

    def memory(self):
        """Return the most memory that it has held so far, in MiB (Linux)."""
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
            while sum(map(len, heard)) < 150:
                heard.append([line["message"] for line in lines_in(await client.frame())])
                most = max(most, len(heard[-1]))
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


# What a client may send by mistake or on purpose, and a word that the answer must have.
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


class BadInputGetsAnAnswer(RoomTest):
    """In words, to its sender alone, on a connection that stays open."""

    @gen_test
    async def test_every_kind(self):
        ann, bob = await self.join("Ann"), await self.connect()
        await bob.frame()
        for bad, word in BAD.items():
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
            self.assertIn("frame-ancestors 'none'", policy)
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
        handshake = ("GET /chat HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     f"Sec-WebSocket-Key: {BareClient.KEY}\r\nSec-WebSocket-Version: 13\r\n")
        for request in ("GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.1\r\n\r\n", "\0\r\n\r\n",
                        f"GET / HTTP/1.1\r\nHost: a:{'9' * 5000}\r\n\r\n", handshake + "Origin: http://[\r\n\r\n",
                        handshake + f"Sec-WebSocket-Extensions: x; a*{'9' * 5000}=b\r\n\r\n",
                        "GET / HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data\r\nContent-Length: 1\r\n\r\nx"):
            with self.subTest(request[:50]), socket.create_connection(("127.0.0.1", self.server.port), WAIT) as stranger:
                stranger.sendall(request.encode())
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(65536):
                    pass
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

    def test_one_that_floods_gets_one_line_into_each_flush(self):
        flooder, ann = self.client("Flooder"), self.client("Ann")
        ann.hear_until("Ann joined")
        flood = b"".join(masked(json.dumps(say(str(i), nick="Flooder"))) for i in range(2000))
        threading.Thread(target=flooder.flood, args=[flood], daemon=True).start()
        threading.Thread(target=lambda: [flooder.frame() for _ in range(1000)], daemon=True).start()
        heard = []
        while len(heard) < 2000:
            _, payload = ann.frame()
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


class TheSlowAreWaitedFor(RoomTest):
    """On a network where TCP takes little at once, as on a phone far from its mast."""

    def setUp(self):
        super().setUp()
        original = server.WSHandler.open

        def open_on_a_slow_network(handler):
            handler.ws_connection.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            original(handler)

        for patch in (mock.patch.object(server.WSHandler, "open", open_on_a_slow_network),
                      mock.patch.object(server, "PACE", 8 * server.PACE)):  # to be done soon
            patch.start()
            self.addCleanup(patch.stop)

    @gen_test(timeout=WAIT)
    async def test_a_crowd_that_posts_the_longest_lines_cuts_nobody_off(self):
        clients = [await self.join("Ann")]
        for i in range(250):  # 1.6 MB in one breath, more than may wait for a client
            server.broadcast(server.line(id=str(i), **LONGEST))
        for client in clients:
            self.assertEqual([(await client.hear())["id"] for _ in range(250)], [str(i) for i in range(250)])

    @gen_test(timeout=2 * WAIT)
    async def test_what_waits_for_a_client_goes_before_what_comes_later(self):
        run = asyncio.get_running_loop().run_in_executor
        client = await run(None, lambda: BareClient(self.get_http_port(), small_buffer=True))
        self.addCleanup(client.vanish)
        said, behind = 0, 0
        while not behind:  # without a turn of the event loop: what TCP does not take stays in the queue
            server.outbox.append(server.line("x" * 1000, id=str(said), nick="Ann"))
            behind, said = server.flush(), said + 1
        frames = bytearray()
        client.socket.settimeout(0.1)
        with contextlib.suppress(TimeoutError):  # now TCP has room again, and the queue has not moved
            while True:
                frames += client.socket.recv(65536)
        server.outbox.append({"type": "message", "message": "the end"})
        server.flush()
        client.socket.settimeout(WAIT)
        while not frames.endswith(b'"the end"}'):
            frames += await run(None, client.socket.recv, 65536)
        client.reader = io.BytesIO(frames)
        heard = [line["id"] for line in client.hear_until("the end") if "id" in line]
        self.assertEqual(heard, [str(i) for i in range(said)])

    @gen_test(timeout=WAIT)
    async def test_a_history_of_the_longest_lines_lets_newcomers_in(self):
        for i in range(server.HISTORY):
            server.messages.append(server.line("😀" * 1000, id=str(i), nick="😀" * 30))
        client = await self.connect()
        self.assertEqual(len((await client.frame())["data"]), server.HISTORY)
        await client.say(say("in"))
        self.assertEqual((await client.hear())["message"], "in")


class TheSilentAreNoticed(RoomTest):
    def get_app(self):
        self.assertEqual(server.application.settings["websocket_ping_interval"], 20)
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
        return subprocess.run([sys.executable, HERE / "server.py", *options], capture_output=True, text=True, timeout=WAIT,
                              check=False)

    def test_it_serves_from_any_folder_on_localhost_and_says_where(self):
        with tempfile.TemporaryDirectory() as elsewhere:
            process = ServerProcess(cwd=elsewhere)
            self.addCleanup(process.stop)
            self.assertIn(f"http://localhost:{process.port}/", process.greeting)
            with urllib.request.urlopen(process.url) as page:
                self.assertIn("Welcome to ScopyChat", page.read().decode())
            listening = pathlib.Path("/proc/net/tcp").read_text()
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
        for process, signum in [(ServerProcess(), signum) for signum in (signal.SIGTERM, signal.SIGINT)]:
            clients = [BareClient(process.port, f"Ann {i}") for i in range(20)]
            deaf = BareClient(process.port, "Deaf", small_buffer=True)
            silent = socket.create_connection(("127.0.0.1", process.port))
            for client in clients:
                client.hear_until("Deaf joined")
            for i in range(500):
                clients[i % 20].say(say("x" * 900, id=str(i)))
            clients[0].hear()
            flooders = [BareClient(process.port) for _ in range(3)]
            for flooder in flooders:  # it stops in the middle of a flood
                threading.Thread(target=flooder.flood, args=[masked(json.dumps(say("flood"))) * 20000], daemon=True).start()
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
            for still_there in *clients, *flooders, deaf:  # cleanups run from the last to the first
                self.addCleanup(still_there.vanish)
            self.addCleanup(silent.close)
            self.addCleanup(lambda process=process: self.assertEqual(process.finish(), (0, "")))


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


class Proxy:
    """A network that fails: a TCP proxy that can reset its connections, or swallow what they carry."""

    def __init__(self, target):
        self.target, self.pairs, self.swallowing, self.down = target, [], set(), False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                try:
                    far = None if self.down else socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    far = None
                if far is None:
                    near.close()
                    continue
                self.pairs.append((near, far))
                for pair in (near, far), (far, near):
                    threading.Thread(target=self.pump, args=pair, daemon=True).start()

    def pump(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source not in self.swallowing and target not in self.swallowing:
                    target.sendall(data)
        for end in source, target:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def reset(self, pair):
        for end in pair:
            with contextlib.suppress(OSError):  # it may have ended already
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RD)
            end.close()

    def reset_one(self, chance):
        if self.pairs:
            self.reset(self.pairs.pop(chance.randrange(len(self.pairs))))

    def swallow(self):
        """From now on the connections that there are carry nothing, and do not end either."""
        self.swallowing.update(end for pair in self.pairs for end in pair)

    def close(self):
        self.listener.close()
        for pair in self.pairs:
            self.reset(pair)


class ThePage(unittest.TestCase):
    """Real windows of a real browser, in which people join, talk, read, and lose their network."""

    JQUERY = MODULES / "jquery/dist/jquery.min.js"
    AXE = MODULES / "axe-core/axe.min.js"

    @classmethod
    def setUpClass(cls):
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        need(sync_playwright, "Playwright", "pip install playwright")
        need(chromium, "Chromium", "install your system's package, on Debian `apt-get install chromium`")
        need(cls.JQUERY.exists() and cls.AXE.exists(), "jQuery or axe-core", "npm install --prefix .ci jquery@4.0.0 axe-core@4")
        playwright = sync_playwright().start()
        cls.addClassCleanup(playwright.stop)
        cls.browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-features=LocalNetworkAccessChecks"])
        cls.addClassCleanup(cls.browser.close)

    def setUp(self):
        self.start()
        self.addCleanup(lambda: self.assertEqual(self.server.stop(), (0, "")))
        self.proxy = Proxy(self.server.port)
        self.addCleanup(self.proxy.close)
        self.errors = []
        self.addCleanup(lambda: self.assertEqual(self.errors, []))

    def start(self, port=0):
        self.server = ServerProcess(port=port)
        self.assertTrue(self.server.port)

    def window(self, nick=None, jquery=None, clock=False, **context):
        context = self.browser.new_context(**context)
        self.addCleanup(context.close)
        jquery = self.JQUERY.read_bytes() if jquery is None else jquery
        context.route("https://code.jquery.com/**", lambda route: route.fulfill(
            body=jquery, content_type="text/javascript", headers={"Access-Control-Allow-Origin": "*"}))
        if clock:
            context.clock.install()
        page = context.new_page()
        page.set_default_timeout(WAIT * 1000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(f"http://localhost:{self.proxy.port}/")
        page.evaluate("() => window.jQuery && new Promise(ready => jQuery(ready))")
        if nick:
            self.join(page, nick)
        return page

    def join(self, page, nick):
        page.get_by_label("Nick").fill(nick)
        page.get_by_role("button", name="Join").click()
        expect(page.get_by_text("chat server connected").first).to_be_visible()

    def post(self, page, *messages):
        for message in messages:
            page.get_by_label("Post as").fill(message)
            page.get_by_label("Post as").press("Enter")

    def said(self, page):
        return [text.strip() for text in page.locator("#chat li:not(.pending):has(b) > bdi").all_text_contents()]

    def wait(self, page, condition, argument=None):
        page.wait_for_function(condition, arg=argument)

    def bot(self, nick=None):
        client = BareClient(self.server.port, nick)
        client.socket.settimeout(WAIT)
        self.addCleanup(client.vanish)
        return client

    def test_two_windows_talk(self):
        ann = self.window()
        self.assertRegex(ann.get_by_label("Nick").input_value(), r"^User\d+$")
        self.assertTrue(ann.evaluate("jQuery.fn.jquery === '4.0.0'"))
        self.join(ann, "  Ann ")
        expect(ann.get_by_text("Post as Ann", exact=True)).to_be_visible()
        expect(ann.locator("#login")).to_be_hidden()
        expect(ann.get_by_label("Post as")).to_be_focused()
        self.post(ann, "hello", "   ", "", "<img src=x onerror=alert(1)><b>bold</b>")
        expect(ann.locator("#chat li.mine")).to_have_count(2)
        bob = self.window("Bob")
        expect(bob.locator("#chat li", has_text="Ann: hello")).to_be_visible()
        expect(bob.locator("#chat li:not(.notice)")).to_have_count(2)
        expect(bob.locator("#chat img, #chat bdi b")).to_have_count(0)
        expect(bob.locator("#chat li.mine")).to_have_count(0)
        self.post(bob, "hi Ann")
        expect(ann.locator("#chat li", has_text="Bob: hi Ann")).to_be_visible()
        expect(ann.locator("#chat li.pending")).to_have_count(0)
        self.assertRegex(ann.locator("#chat li", has_text="hi Ann").locator("time").inner_text(), r"\d\d?:\d\d")
        for page in ann, bob:
            expect(page.get_by_role("status")).to_have_text("Connected, 2 online")
            self.assertEqual(self.said(page), ["hello", "<img src=x onerror=alert(1)><b>bold</b>", "hi Ann"])
        expect(ann.locator("#chat li", has_text="Bob joined")).to_be_visible()
        bob.close()
        expect(ann.locator("#chat li", has_text="Bob left")).to_be_visible()
        expect(ann.get_by_role("status")).to_have_text("Connected, 1 online")

    def test_everything_by_keyboard(self):
        page = self.window()
        for key in "Tab", "Control+a", "A", "n", "n", "Enter", "h", "i", "Enter":
            page.keyboard.press(key)
        expect(page.locator("#chat li", has_text="Ann: hi")).to_be_visible()
        page.keyboard.press("Shift+Tab")
        expect(page.get_by_role("log")).to_be_focused()  # where the arrow keys scroll

    def test_markup_could_not_run_even_if_it_got_into_the_page(self):
        page = self.window()
        page.evaluate("""() => {
            document.getElementById('chat').innerHTML = '<img src=x onerror="window.ran = 1">';
            document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 2'}));
            document.body.append(Object.assign(document.createElement('script'), {src: '/evil.js'}));
        }""")
        page.wait_for_timeout(100)
        self.assertIsNone(page.evaluate("window.ran ?? null"))

    def test_the_readers_place_is_kept_and_the_page_stays_small(self):
        ann, bot = self.window("Ann", viewport={"width": 800, "height": 500}), self.bot("Bot")
        for i in range(60):
            bot.say(say(f"line {i}", nick="Bot"))
        expect(ann.locator("#chat li", has_text="line 59")).to_be_in_viewport()
        ann.evaluate("jQuery('#log').scrollTop(0)")
        expect(ann.locator("#chat li", has_text="Bot joined")).to_be_in_viewport()
        for i in range(60, 80):
            bot.say(say(f"line {i}", nick="Bot"))
        expect(ann.locator("#chat li", has_text="line 79")).to_be_attached()
        expect(ann.locator("#chat li", has_text="Bot joined")).to_be_in_viewport()
        ann.get_by_role("button", name="New lines").click()
        expect(ann.locator("#chat li", has_text="line 79")).to_be_in_viewport()
        expect(ann.get_by_role("button", name="New lines")).to_be_hidden()
        for i in range(80, 700):
            bot.say(say(f"line {i}", nick="Bot"))
        expect(ann.locator("#chat li", has_text="line 699")).to_be_in_viewport()
        ann.set_viewport_size({"width": 800, "height": 250})  # as when a keyboard comes up
        expect(ann.locator("#chat li", has_text="line 699")).to_be_in_viewport(ratio=1)
        self.assertEqual(self.said(ann), [f"line {i}" for i in range(200, 700)])
        self.assertEqual(ann.locator("#chat li").count(), 500)

    def test_a_hidden_page_keeps_only_what_it_will_show(self):
        ann, bot = self.window("Ann"), self.bot("Bot")
        expect(ann.locator("#chat li", has_text="Bot joined")).to_be_visible()
        ann.evaluate("""() => {  // as in a hidden tab: there are no animation frames
            window.due = [];
            window.requestAnimationFrame = draw => window.due.push(draw);
            window.kept = 0;
            const push = Array.prototype.push;
            Array.prototype.push = function(...items) {
                const length = push.apply(this, items);
                if (items[0] && items[0].nick === 'Bot') {
                    window.kept = Math.max(window.kept, length);
                    window.newest = items[0].message;
                }
                return length;
            };
        }""")
        for i in range(1200):
            bot.say(say(f"line {i}", nick="Bot"))
        for _ in range(WAIT * 20):
            if ann.evaluate("window.newest") == "line 1199":
                break
            time.sleep(0.05)
        self.assertEqual(self.said(ann), [])
        self.assertLessEqual(ann.evaluate("window.kept"), 501)
        ann.evaluate("() => { for (let i = 0; i < window.due.length; i++) { window.due[i](); } }")
        self.assertEqual(self.said(ann), [f"line {i}" for i in range(700, 1200)])

    def test_it_fits_a_phone_and_axe_finds_nothing(self):
        page = self.window(viewport={"width": 320, "height": 568}, bypass_csp=True)  # for axe, which is a script
        page.add_script_tag(path=self.AXE)

        def check():
            for scheme in "light", "dark":
                page.emulate_media(color_scheme=scheme)
                self.assertEqual(page.evaluate("async () => (await axe.run()).violations.map("
                                               "v => v.id + ': ' + v.nodes.map(n => n.html).join())"), [])
            self.assertLessEqual(page.evaluate("document.documentElement.scrollWidth"), 320)
            self.assertEqual(page.evaluate("document.documentElement.scrollHeight"), 568)

        check()
        self.join(page, "W" * 30)
        bot = self.bot("Bot")
        bot.say(say("W" * 99, nick="W" * 30))
        bot.say(say("the last line", nick="Bot"))
        page.evaluate("ws.send('bad')")
        expect(page.locator("#chat li.error")).to_be_in_viewport()
        page.evaluate("""() => {
            for (let hue = 0; hue < 360; hue += 8) {  // the colours of nicks
                jQuery('<li><b>nick</b></li><li class="mine"><b>nick</b></li>').appendTo('#chat').css('--hue', hue);
            }
        }""")
        self.proxy.swallow()
        self.post(page, "on its way")
        expect(page.locator("#chat li.pending")).to_be_in_viewport()
        check()
        for part in page.get_by_label("Post as"), page.get_by_role("button", name="Post"):
            expect(part).to_be_in_viewport(ratio=1)

    def test_without_jquery_it_says_so(self):
        for jquery in b"", self.JQUERY.read_bytes() + b" ":  # nothing came; not what we asked for, by its integrity
            page = self.window(jquery=jquery)
            expect(page.get_by_role("status")).to_contain_text("needs jQuery")
            self.errors.clear()

    def test_what_is_posted_while_the_server_is_away_is_said_when_it_is_back(self):
        ann, bob = self.window("Ann"), self.window("Bob")
        self.post(ann, "before")
        expect(bob.locator("#chat li", has_text="before")).to_be_visible()
        port = self.server.port
        self.assertEqual(self.server.stop(), (0, ""))
        expect(ann.get_by_text("chat server disconnected: the server stops (1001)")).to_be_visible()
        expect(ann.get_by_role("status")).to_contain_text("Next attempt in")
        self.post(ann, "meanwhile", "and this")
        expect(ann.locator("#chat li.pending")).to_have_text(["Ann: meanwhilesending …", "Ann: and thissending …"])
        self.start(port)
        for page in ann, bob:
            page.evaluate("() => window.dispatchEvent(new Event('focus'))")  # somebody looks at it: it tries at once
            self.wait(page, "() => jQuery('#chat li:not(.pending):contains(and this)').length")
            self.assertEqual(self.said(page), ["before", "meanwhile", "and this"])
        cleo = self.window("Cleo")  # the new server was told again what had been said just before
        self.wait(cleo, "() => jQuery('#chat li b').length === 3")
        self.assertEqual(set(self.said(cleo)), {"before", "meanwhile", "and this"})

    def test_what_a_dead_connection_swallowed_is_sent_again(self):
        ann, bot = self.window("Ann", clock=True), self.bot("Bot")
        self.proxy.swallow()
        self.post(ann, "can you hear me?")
        expect(ann.locator("#chat li.pending")).to_have_count(1)
        ann.clock.run_for(11_000)
        for _ in range(40):
            ann.clock.run_for(1000)
            if not ann.locator("#chat li.pending").count():
                break
            ann.wait_for_timeout(50)
        self.assertEqual(self.said(ann), ["can you hear me?"])
        bot.hear_until("can you hear me?")

    def test_missed_messages_are_filled_in_or_owned_up_to(self):
        ann, bot = self.window("Ann"), self.bot("Bot")
        self.post(ann, "here")
        bot.hear_until("here")
        for gap, first in (50, "here"), (150, None):
            self.proxy.down = True
            while self.proxy.pairs:
                self.proxy.reset(self.proxy.pairs.pop())
            expect(ann.get_by_role("status")).to_contain_text("Disconnected")
            for i in range(gap):
                bot.say(say(f"{gap}-{i}", nick="Bot"))
            bot.hear_until(f"{gap}-{gap - 1}")
            self.proxy.down = False
            ann.evaluate("() => window.dispatchEvent(new Event('online'))")
            self.wait(ann, "last => jQuery('#chat li:contains(' + last + ')').length", f"{gap}-{gap - 1}")
            missing = ann.locator("#chat li", has_text="messages may be missing here")
            expect(missing).to_have_count(0 if first else 1)
        self.assertEqual(self.said(ann), ["here", *(f"50-{i}" for i in range(50)), *(f"150-{i}" for i in range(50, 150))])

    def test_nothing_is_lost_on_a_network_that_fails_and_a_server_that_restarts(self):
        chance = random.Random(20121203)
        pages = [self.window(nick) for nick in ("Ann", "Bob", "Cleo")]
        posted = []
        for i in range(50):
            posted.append(f"line {i}.")
            self.post(chance.choice(pages), posted[-1])
            if chance.random() < 0.3:
                self.proxy.reset_one(chance)
            if i == 20:
                port = self.server.port
                self.assertEqual(self.server.stop(), (0, ""))
            if i == 28:
                self.start(port)
        for page in pages:
            page.evaluate("() => window.dispatchEvent(new Event('online'))")
            self.wait(page, "count => jQuery('#chat li:not(.pending) b').length >= count", len(posted))
            self.wait(page, "() => jQuery('#chat li.pending').length === 0")
            self.assertEqual(sorted(self.said(page)), sorted(posted))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as there:
        return there.getsockname()[1]


def wait_for_port(port):
    for _ in range(WAIT * 20):
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port)).close()
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on {port}")


class TheReadme(unittest.TestCase):
    """What the README says is so, and what it tells a reader to run, runs."""

    TEXT = (HERE / "README.md").read_text() if (HERE / "README.md").exists() else ""

    def block(self, language, containing):
        """Return the one code block in this language that contains this."""
        found = [block for block in re.findall(rf"(?ms)^```{language}\n(.*?)^```$", self.TEXT) if containing in block]
        self.assertEqual(len(found), 1, f"{language} {containing}")
        return found[0]

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def spawn(self, *command, **more):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)
        self.addCleanup(process.wait, WAIT)
        self.addCleanup(process.terminate)
        return process

    def test_its_two_commands_end_as_they_must(self):
        """`.ci/run` runs both, on a fresh clone."""
        self.assertTrue(self.block("sh", "&& python server.py").strip().endswith("&& python server.py"))
        self.assertTrue(self.block("sh", "-m unittest").strip().endswith("&& python -m unittest"))

    def test_what_it_points_to_exists(self):
        for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)#\"]+)", self.TEXT):
            if "://" not in target:
                self.assertTrue((HERE / target).exists(), target)

    def test_what_it_quotes_from_the_script_is_there(self):
        script, page = (HERE / "server.py").read_text(), (HERE / "test.html").read_text()
        for name in re.findall(r"`([A-Z][A-Z_]+)`", self.TEXT):
            self.assertRegex(script + page + self.TEXT, rf"(?m)^ *(var )?{name} = |environ.get..{name}")
        for name in re.findall(r"`(\w+)\(\)`", self.TEXT):
            self.assertRegex(script + page, rf"(def|function) {name}\(")

    def test_the_chat_from_the_command_line(self):
        need(importlib.util.find_spec("websockets"), "websockets", "pip install websockets")
        command, *shown = self.block("console", "-m websockets").splitlines()
        process = ServerProcess()
        self.addCleanup(process.stop)
        client = subprocess.Popen(
            [sys.executable, *command.replace("8888", str(process.port)).split()[1:]], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True)
        printed = []

        def heard():
            printed.append(client.stdout.readline() or self.fail(printed))
            printed[-1] = re.sub(r"\x1b[78]|\x1b\[\w|[\r\n>]", "", printed[-1]).strip()  # how it moves the cursor
            return printed[-1]

        def blurred(text):
            return re.sub(r'"time": [\d.]+|"id": "[^"]+"|:\d+/chat', "", text)

        for line in shown:
            if line.startswith("> "):
                client.stdin.write(line[2:] + "\n")
                client.stdin.flush()
            else:
                while not heard():
                    pass
                self.assertEqual(blurred(printed[-1]), blurred(line))
        client.communicate()

    def test_behind_a_proxy_with_tls(self):
        need(shutil.which("caddy"), "Caddy", "install your system's package, on Debian `apt-get install caddy`")
        process, port = ServerProcess(), free_port()
        self.addCleanup(process.stop)
        config = self.block("caddyfile", "reverse_proxy").replace("chat.example.com", f"localhost:{port}")
        config = config.replace("8888", str(process.port)).replace("{", "{\n\ttls internal", 1)
        (self.folder / "Caddyfile").write_text(
            "{\n\tadmin off\n\tskip_install_trust\n\tauto_https disable_redirects\n}\n" + config)
        self.spawn("caddy", "run", "--config", self.folder / "Caddyfile",
                   env={**os.environ, "XDG_DATA_HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder)})
        wait_for_port(port)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        for _ in range(WAIT * 10):
            with contextlib.suppress(OSError):
                page = urllib.request.urlopen(f"https://localhost:{port}/", context=context).read().decode()
                break
            time.sleep(0.1)  # it is making its certificate
        self.assertIn("Welcome to ScopyChat", page)

        async def talk():
            request = HTTPRequest(f"wss://localhost:{port}/chat", validate_cert=False,
                                  headers={"Origin": f"https://localhost:{port}"})
            client = Client(await websocket_connect(request))
            await client.frame()
            await client.say(say("through the proxy"))
            heard = await client.hear()
            client.connection.close()
            return heard["message"]

        self.assertEqual(asyncio.run(talk()), "through the proxy")

    def test_one_room_in_two_processes(self):
        need(shutil.which("redis-server"), "Redis", "install your system's package, on Debian `apt-get install redis-server`")
        need(importlib.util.find_spec("redis"), "redis for Python", "pip install redis")
        recipe = self.block("python", "import server")
        self.assertLessEqual(len(recipe.splitlines()), 40)
        (self.folder / "scale.py").write_text(recipe)
        port = free_port()

        def start_redis():
            redis = self.spawn("redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "",
                               "--appendonly", "yes", "--appendfsync", "always", cwd=self.folder)
            wait_for_port(port)
            return redis

        def start():
            started = [ServerProcess(script=self.folder / "scale.py", env={
                **os.environ, "REDIS_URL": f"redis://localhost:{port}", "PYTHONPATH": str(HERE)}) for _ in range(2)]
            return started, [BareClient(process.port, nick) for process, nick in zip(started, "AB", strict=True)]

        def stop(processes, clients):
            for client in clients:
                client.vanish()
            for process in processes:
                self.assertEqual(process.stop(), (0, ""))

        def messages(client):
            return [line["message"] for line in client.heard if "nick" in line]

        redis, (processes, (ann, bob)) = start_redis(), start()
        ann.hear_until("B joined")
        for i in range(30):
            ann.say(say(f"a{i}", id=f"a{i}"))
            bob.say(say(f"b{i}", id=f"b{i}"))
        ann.say(say("twice", id="twice"))
        bob.say(say("twice", id="twice"))
        for i in range(2):
            (ann, bob)[i].say(say(f"end {i}"))
        for client in ann, bob:
            while not {"end 0", "end 1"} <= set(messages(client)):
                client.hear()
        said = messages(ann)
        self.assertEqual(messages(bob), said)
        self.assertEqual(sorted(said), sorted(
            [f"{who}{i}" for who in "ab" for i in range(30)] + ["twice", "end 0", "end 1"]))

        redis.terminate()
        redis.wait()
        ann.say(say("in vain", id="in vain"))
        self.assertEqual(ann.hear()["type"], "error")
        redis = start_redis()
        answer = {"type": "error"}
        while answer["type"] == "error":
            ann.say(say("in vain", id="in vain"))
            answer = ann.hear()
        bob.hear_until("in vain")
        stop(processes, [ann, bob])

        processes, clients = start()
        for process in processes:
            history = []
            while "in vain" not in history:  # it is reading it from the stream
                clients.append(BareClient(process.port))
                history = [line["message"] for line in json.loads(clients[-1].frame()[1])["data"]]
            self.assertEqual(history, [*said, "in vain"])
        stop(processes, clients)


if __name__ == "__main__":
    unittest.main()
