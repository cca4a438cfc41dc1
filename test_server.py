"""What the chat promises, seen from outside: over HTTP, a socket, a browser, and in the server's exit and log.

`python -m unittest` runs all of it.  Each test has a server process of its own.  What a test needs and cannot find is a
reason to skip it, and the reason says how to get it; `.ci/run` gets everything, and with CI=true nothing is skipped.
"""
import collections
import concurrent.futures
import contextlib
import datetime
import functools
import importlib.util
import json
import os
import pathlib
import random
import re
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

import server

try:
    import resource
except ImportError:  # on Windows
    resource = None
try:
    from websockets.client import ClientProtocol
    from websockets.uri import parse_uri
except ImportError:
    ClientProtocol = None
try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None

HERE = pathlib.Path(__file__).resolve().parent
JQUERY = HERE / ".ci/node_modules/jquery/dist/jquery.min.js"
AXE = HERE / ".ci/node_modules/axe-core/axe.min.js"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
WAIT = 10  # seconds after which something that should come counts as lost
UNIX = unittest.skipIf(resource is None, "it sends signals, or limits files, as only Unix can")


def need(there, what, how):
    """Skip a test where something is absent, and say how to get it; with CI=true, fail."""
    if not there:
        if os.environ.get("CI") == "true":
            raise AssertionError(f"{what} is absent, and with CI=true nothing may be skipped")
        raise unittest.SkipTest(f"{what} is absent. To run this test: {how}")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as there:
        return there.getsockname()[1]


def new_message(message, nick="Ann", **more):
    return {"type": "new_message", "nick": nick, "message": message, **more}


# ---- Tools: a server process, a guest, and a test that has both --------------------------------------------------------


class Chat:
    """A server process on a free port: `python server.py`, or Python code that changes a limit and then runs it."""

    def __init__(self, *options, changes=None, script=HERE / "server.py", port=None, files=None, **more):
        self.port, self.log_file = port or free_port(), tempfile.TemporaryFile("w+")
        script = [script]
        if changes:
            script = ["-c", f"import asyncio, server\n{changes}\nasyncio.run(server.main())"]
        limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
        self.process = subprocess.Popen(
            [sys.executable, *script, f"--port={self.port}", *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=self.log_file, text=True, preexec_fn=limit, **{"cwd": HERE, **more})
        self.url = f"http://localhost:{self.port}/"

    @functools.cached_property
    def greeting(self):
        """Its first line, which it prints when it is ready."""
        return self.process.stdout.readline()

    def log(self):
        self.log_file.seek(0)
        return self.log_file.read()

    def stop(self, signum=signal.SIGTERM):
        """Stop it, unless a signal was sent already (None); return its exit status and its log, the first time."""
        if self.process.stdout.closed:
            return None
        if signum:
            self.process.send_signal(signum)
        try:
            return self.process.wait(WAIT), self.log()
        finally:
            self.process.kill()
            self.process.stdout.close()
            self.log_file.close()

    @contextlib.contextmanager
    def frozen(self):
        """Whatever happens meanwhile arrives at the server at one moment."""
        self.process.send_signal(signal.SIGSTOP)
        yield
        self.process.send_signal(signal.SIGCONT)

    def memory(self, field="VmRSS"):
        """Return its memory in MiB (Linux)."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+)", status)[1]) // 1024

    def files(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


class Guest:
    """Somebody in the chat.  Reads only when told to, and can be slow or misbehave; the protocol is websockets' own."""

    def __init__(self, port, nick=None, slow=False, **headers):
        self.socket = socket.socket()
        self.socket.settimeout(WAIT)
        if slow:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        self.socket.connect(("127.0.0.1", port))
        self.protocol = ClientProtocol(parse_uri(f"ws://localhost:{port}/chat"), max_size=None)
        self.events, self.lines, self.heard = collections.deque(), collections.deque(), []
        request = self.protocol.connect()
        request.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
        self.protocol.send_request(request)
        self.write()
        self.status = self.event().status_code
        if nick:
            self.frame()
            self.send({"type": "join", "nick": nick})
            self.until(f"{nick} joined")

    def write(self):
        for data in self.protocol.data_to_send():
            if data:
                self.socket.sendall(data)

    def send(self, data):
        """Send an object, or a text, or bytes, in a frame."""
        if isinstance(data, bytes):
            self.protocol.send_binary(data)
        else:
            self.protocol.send_text((data if isinstance(data, str) else json.dumps(data)).encode())
        self.write()

    def say(self, message, nick="Ann", **more):
        self.send(new_message(message, nick, **more))

    def raw(self, data):
        """Send bytes as they are; the server may hang up meanwhile."""
        with contextlib.suppress(OSError):
            self.socket.sendall(data)

    def event(self):
        """Return what comes next: the response to the handshake, then frames; None at the end."""
        while not self.events:
            try:
                data = self.socket.recv(1 << 20)
            except ConnectionError:
                data = b""
            if data:
                self.protocol.receive_data(data)
            else:
                self.protocol.receive_eof()
            self.events.extend(self.protocol.events_received())
            with contextlib.suppress(OSError):
                self.write()  # pings are answered here
            if not data and not self.events:
                return None
        return self.events.popleft()

    def text(self):
        """Return the text in the next frame that has one."""
        while (event := self.event()) is not None and event.opcode != 8:
            if event.opcode == 1:
                return event.data.decode()
        raise AssertionError(f"no text, but {event}")

    def frame(self):
        """Return the next object, but no heartbeat."""
        while (data := json.loads(self.text())) and data["type"] == "list" and not data["data"] and self.heard:
            pass
        self.heard.append(data)
        return data

    def line(self):
        """Return the next line.  A list has several; others are one."""
        while not self.lines:
            data = self.frame()
            self.lines.extend(data["data"] if data["type"] == "list" else [data])
        return self.lines.popleft()

    def until(self, message):
        """Return all lines up to the one with this message."""
        lines = [self.line()]
        while lines[-1]["message"] != message:
            lines.append(self.line())
        return lines

    def said(self, message):
        """Return what people said, up to this message."""
        return [line["message"] for line in self.until(message) if "nick" in line]

    def messages(self, count):
        """Return the next so many lines that people said."""
        said = []
        while len(said) < count:
            said += [line for line in [self.line()] if "nick" in line]
        return said

    def closing(self):
        """Read to the end; return code and reason of the close frame, or None where there was none."""
        while self.event() is not None:
            pass
        close = self.protocol.close_rcvd
        return close and (close.code, close.reason)

    def vanish(self):
        """Reset the connection, as when a machine crashes."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class ChatTest(unittest.TestCase):
    """A test with a server of its own, which in the end must stop well, and with an empty log."""

    CHANGES = FILES = spare = None

    def setUp(self):
        need(ClientProtocol, "websockets", "pip install websockets")

    @functools.cached_property
    def chat(self):
        cls = type(self)
        chat = cls.spare or Chat(changes=self.CHANGES, files=self.FILES)
        cls.spare = Chat(changes=self.CHANGES, files=self.FILES)  # for the next test; it starts while this one runs
        return self.use(chat)

    @classmethod
    def tearDownClass(cls):
        if cls.spare:
            cls.spare.stop(KILL)

    def start(self, *options, **more):
        return self.use(Chat(*options, **more))

    def use(self, chat):
        """Wait until a server is ready; when the test has ended, stop it."""
        self.assertIsNotNone(chat.greeting)
        if resource:  # elsewhere nothing can ask a process to stop
            self.addClassCleanup(lambda: self.assertIn(chat.stop(None), [(0, ""), None]))  # it has had time to stop
        else:
            self.addCleanup(chat.stop)
        self.addCleanup(chat.process.terminate)
        return chat

    def guest(self, nick=None, chat=None, **more):
        guest = Guest((chat or self.chat).port, nick, **more)
        self.addCleanup(guest.socket.close)
        return guest


# ---- The server --------------------------------------------------------------------------------------------------------


class EverybodyHearsEverything(ChatTest):
    def test_a_newcomer_gets_the_history_and_a_message_has_these_fields(self):
        ann = self.guest()
        self.assertEqual(ann.frame(), {"type": "list", "data": [], "online": 1})
        ann.say("hi", id="k3j9x")
        said = ann.frame()
        self.assertEqual(self.guest().frame(), {"type": "list", "data": [said], "online": 2})
        self.assertAlmostEqual(said.pop("time"), time.time(), delta=60)
        self.assertEqual(said, {"type": "message", "id": "k3j9x", "nick": "Ann", "message": "hi"})

    def test_everybody_hears_each_message_once_and_in_the_same_order(self):
        guests = [self.guest(nick) for nick in ("Ann", "Bob", "Cleo")]
        for i in range(10):
            for guest in guests:
                guest.say(f"{i}")
        orders = [[(line["nick"], line["message"]) for line in guest.messages(30)] for guest in guests]
        self.assertEqual(orders, [orders[0]] * 3)
        for nick in "Ann", "Bob", "Cleo":
            self.assertEqual([said for who, said in orders[0] if who == nick], [f"{i}" for i in range(10)])

    def test_a_message_without_an_id_gets_one(self):
        ann = self.guest("Ann")
        ann.say("one")
        ann.say("two")
        self.assertEqual(len({ann.line()["id"], ann.line()["id"]}), 2)

    def test_joining_and_leaving_is_told_and_not_kept(self):
        ann = self.guest("Ann")
        bob = self.guest("Bob")
        joined = ann.line()
        self.assertAlmostEqual(joined.pop("time"), time.time(), delta=60)
        self.assertEqual(joined, {"type": "message", "message": "Bob joined", "online": 2})
        bob.socket.close()
        left = ann.line()
        self.assertEqual((left["message"], left["online"]), ("Bob left", 1))
        self.assertEqual(self.guest().frame()["data"], [])

    def test_a_client_speaks_under_the_nick_that_it_joined_with(self):
        ann = self.guest("Ann")
        for frame in new_message("hi", nick="Bob"), {"type": "new_message", "message": "hi"}:
            ann.send(frame)
            self.assertEqual(ann.line()["nick"], "Ann")
        ann.send({"type": "join", "nick": "Bob"})
        self.assertEqual(ann.line()["type"], "error")

    @UNIX
    def test_what_arrives_together_leaves_together_and_a_repetition_in_it_is_known(self):
        guests = [self.guest() for _ in range(30)]
        for guest in guests:
            guest.frame()
        with self.chat.frozen():
            for number, guest in enumerate(guests):
                guest.say(f"{number}", id=f"{number // 2}")
        guests[0].say("the end")
        self.assertEqual(len(guests[1].said("the end")), 16)
        self.assertLess(len(guests[1].heard), 12)  # frames; with one for each line there would be 17

    def test_the_posts_own_page_can_chat(self):
        """Its frames have no id; it never joins; it understands `list`, and shows the `message` of anything else."""
        ann, shown = self.guest(), []
        for _ in range(2):
            ann.send('{"type":"new_message","nick":"Ann","message":"hello"}')
        while len(shown) < 2:
            data = ann.frame()
            for entry in data["data"] if data["type"] == "list" else [data]:
                shown.append((entry["nick"] + ": " if entry.get("nick") else "") + entry["message"])
        self.assertEqual(shown, ["Ann: hello"] * 2)
        ann.send('{"type":"new_message","nick":"","message":"hello"}')
        self.assertIn("nick", ann.frame()["message"])


class TheHistory(ChatTest):
    CHANGES = "server.PAUSE = 0"

    def test_the_history_is_bounded_and_a_repetition_is_known_by_its_id(self):
        ann, bob = self.guest(), self.guest()
        for i in range(server.HISTORY + 20):
            ann.say(f"{i}", id=f"{i}")
        ann.until(f"{server.HISTORY + 19}")
        oldest = self.guest().frame()["data"]
        self.assertEqual([line["message"] for line in oldest], [f"{i}" for i in range(20, server.HISTORY + 20)])
        for guest in ann, bob, ann:
            guest.say("again", id="22")  # 98 others have come after it
        bob.say("the end")
        self.assertEqual(ann.said("the end"), ["the end"])

    def test_who_comes_in_the_middle_of_the_talk_hears_each_line_once(self):
        guests = [self.guest() for _ in range(8)]
        for i in range(30):
            for number, guest in enumerate(guests):
                guest.say(f"{number} {i}")
            if i % 2:
                guests.append(self.guest())
        guests[0].say("the end")
        for guest in guests:
            said = guest.said("the end")
            self.assertEqual(len(said), len(set(said)))
            for number in range(8):
                numbers = [int(line.split()[1]) for line in said if line.startswith(f"{number} ")]
                self.assertEqual(numbers, list(range(*(numbers and (numbers[0], 30) or (0, 0)))))


class FramesOfEveryLength(ChatTest):
    CHANGES = "server.LENGTHS['message'] = server.application.settings['websocket_max_message_size'] = 70_000"

    def test_at_the_lengths_where_the_header_changes(self):
        ann, overhead = self.guest("Ann"), 95
        for length in 125, 126, 65535, 65536:
            text = ""
            while len(text) != length:  # the digits of its time vary
                message = "x" * (length - overhead)
                ann.say(message, id=os.urandom(8).hex())
                text = ann.text()
                self.assertEqual(json.loads(text)["message"], message)
                overhead = len(text) - len(message)


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
    **{json.dumps(new_message("hi", nick)): "nick" for nick in (None, 1.5, ["Ann"], "", "\t", "n" * 31)},
    **{json.dumps(new_message(message)): "message" for message in (None, 7, ["hi"], {"a": 1}, "", " \n ", "m" * 1001)},
    **{json.dumps(new_message("hi", id=id)): "id" for id in (None, 7, "", " ", "i" * 65, [], {})},
}


class BadInputGetsAnAnswer(ChatTest):
    """In words, to its sender alone, on a connection that stays open."""

    CHANGES = "server.PAUSE = 0"

    def test_every_kind(self):
        ann, bob = self.guest("Ann"), self.guest()
        bob.frame()
        for bad, word in BAD.items():
            with self.subTest(bad[:60]):
                bob.send(bad)
                answer = bob.frame()
                self.assertEqual((set(answer), answer["type"]), ({"type", "message"}, "error"))
                self.assertIn(word, answer["message"])
        bob.send(new_message("m" * 1001, id="k3j9x"))
        self.assertEqual(bob.frame()["id"], "k3j9x")  # which of its messages was refused
        bob.say("still here")
        self.assertEqual([line["message"] for line in ann.until("still here")], ["still here"])

    def test_the_longest_that_is_allowed(self):
        ann = self.guest()
        for line in new_message("m" * 1000, f"  {'n' * 30} ", id="i" * 64), new_message("😀" * 1000, "😀" * 30, id="😀" * 64):
            for spelling in json.dumps(line), json.dumps({**line, "id": "2" + line["id"][1:]}, ensure_ascii=False):
                ann.send(spelling)
                heard = ann.line()
                self.assertEqual((heard["message"], heard["nick"]), (line["message"], line["nick"].strip()))

    def test_only_checked_fields_are_relayed(self):
        ann = self.guest()
        ann.say("hi", id="1", time=0, online=99, data=[1], html="<b>", why="?", mine=True)
        heard = ann.line()
        self.assertEqual(set(heard), {"type", "id", "nick", "message", "time"})
        self.assertGreater(heard["time"], 1e9)

    def test_unicode_that_breaks_naive_code(self):
        ann, bob = self.guest(), self.guest()
        for odd in "\x00", "a\u2028\u2029b", "\u202eabc", "</script>", "\ud800", "\udfff\ud800", "e\u0301":
            ann.say(odd, nick="A" + odd)
            for guest in ann, bob:
                heard = guest.line()
                self.assertEqual((heard["message"], heard["nick"]), (odd, "A" + odd))


class HTTPGetsTheRightAnswer(ChatTest):
    def setUp(self):
        super().setUp()
        self.addCleanup(self.chat.stop)  # before the cleanup that wants an empty log: Tornado logs what is refused

    def get(self, path, method="GET", **headers):
        request = urllib.request.Request(self.chat.url + path, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def test_statuses_and_a_log_of_one_line_for_each_that_is_refused(self):
        for path in "", "?nick=Ann":
            self.assertEqual(self.get(path)[0], 200)
        refused = [self.get("chat")[0], self.get("nowhere")[0], self.get("server.py")[0]]
        refused += [self.get(path, method)[0] for path in ("", "chat") for method in ("POST", "PUT", "DELETE")]
        self.assertEqual(refused, [400, 404, 404, 405, 405, 405, 405, 405, 405])
        with socket.create_connection(("127.0.0.1", self.chat.port), WAIT) as stranger:
            stranger.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\nx")
            while stranger.recv(65536):  # a body is refused before it has come; else this times out
                pass
        log = self.chat.stop()[1]
        self.assertEqual([int(line) for line in re.findall(r"(?m)^(\d+) [A-Z]+ /", log)], refused)
        self.assertLess(len(log.splitlines()), len(refused) + 3, log)
        self.assertNotIn("Traceback", log)

    def test_pages_of_other_sites_are_kept_out(self):
        self.assertEqual(self.guest(Origin="https://evil.example").status, 403)
        self.assertEqual(self.guest(Origin=self.chat.url.rstrip("/")).status, 101)

    def test_the_page_carries_its_policy(self):
        nonces = []
        for _ in range(2):
            page = self.get("")[1]
            self.assertRegex(page, r'id="nick" value="User\d+"')
            policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
            nonces += set(re.findall(r"nonce-([\w-]+)'", policy))
            self.assertEqual(page.count(f'nonce="{nonces[-1]}"'), len(re.findall("<(?:script|style)", page)))
            for rule in "default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'":
                self.assertIn(rule, policy)
            self.assertNotIn("unsafe", policy)
        self.assertEqual(len(set(nonces)), 2)


def frame(payload, first=0x81, mask=b"\0\0\0\0"):
    """Return a frame from a client (RFC 6455, 5.2), also one that is not allowed.  A mask of zeros changes nothing."""
    payload = payload.encode() if isinstance(payload, str) else payload
    size, bit = len(payload), 0x80 if mask else 0
    header = struct.pack("!BB", first, bit | size) if size < 126 else struct.pack("!BBH", first, bit | 126, size)
    return header + mask + payload


class OneCannotHurtTheOthers(ChatTest):
    """Strangers on the network."""

    def setUp(self):
        super().setUp()
        self.ann = self.guest("Ann")

    def still_talks(self):
        self.ann.say("still here")
        return self.ann.said("still here")

    def test_protocol_abuse_closes_that_connection_alone(self):
        hello = json.dumps(new_message("abuse"))
        abuses = {
            "reserved bits": frame(hello, 0xc1),
            "oversized": frame("x" * 16385),
            "oversized, by its header alone": struct.pack("!BBQ", 0x81, 0xff, 1 << 62),
            "bad UTF-8": frame(b"\xff\xfe"),
            "endless fragments": frame("x", 0x01) + frame("x" * 200, 0x00) * 100,
            "a continuation of nothing": frame(hello, 0x80),
            "a message within a message": frame("a", 0x01) + frame(hello),
            "unknown opcode": frame(hello, 0x83),
            "a control frame in fragments": frame("", 0x09),
            "a long control frame": frame("x" * 126, 0x89),
            "a close frame of one byte": frame(b"\x03", 0x88),
            "no WebSocket at all": b"\x16\x03\x01\x02\x00" * 50,
        }
        for what, data in abuses.items():
            with self.subTest(what):
                guest = self.guest()
                guest.raw(data)
                guest.closing()
        self.assertEqual(self.still_talks(), ["still here"])

    def test_one_that_floods_waits_and_the_others_do_not(self):
        flooder, total = self.guest(), 2000
        flood = b"".join(frame(json.dumps(new_message(f"{i}", "Flooder"))) for i in range(total))
        threading.Thread(target=flooder.raw, args=[flood], daemon=True).start()
        flooded = []
        while len(flooded) < 5:
            flooded += self.ann.said("0" if not flooded else f"{len(flooded)}")
        for i in range(20):
            self.ann.say(f"line {i}")
            flooded += self.ann.said(f"line {i}")[:-1]
        self.assertLess(len(flooded), total / 2)
        self.assertEqual(flooded, [f"{i}" for i in range(len(flooded))])
        self.chat.stop(KILL)  # it would wait for the flooder's answer to its goodbye

    def test_those_who_vanish_are_noticed(self):
        for i in range(10):
            ghost = self.guest(f"Ghost {i}")
            self.ann.until(f"Ghost {i} joined")
            ghost.vanish()
            self.ann.until(f"Ghost {i} left")
        for _ in range(50):  # gone before the handshake is over
            with socket.create_connection(("127.0.0.1", self.chat.port)) as stranger:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stranger.sendall(b"GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                                 b"Sec-WebSocket-Key: a\r\nSec-WebSocket-Version: 13\r\n\r\n")
        self.assertEqual(self.still_talks(), ["still here"])

    @unittest.skipUnless(os.path.exists("/proc/self/status"), "it looks into /proc, which only Linux has")
    def test_memory_and_files_are_free_again_when_many_have_left(self):
        def come_and_go():
            for _ in range(3):
                crowd = [self.guest() for _ in range(30)]
                for guest in crowd:
                    guest.say("😀" * 1000)
                self.ann.say("next")
                self.ann.until("next")
                for guest in crowd:
                    guest.vanish()
            self.assertEqual(self.still_talks()[-1], "still here")

        files = self.chat.files()
        come_and_go()
        memory = self.chat.memory()
        come_and_go()
        self.assertLess(self.chat.memory() - memory, 10)
        self.assertLessEqual(self.chat.files(), files + 5)


class TheSlowAreHeldUpAndTheDeafAreCutOff(ChatTest):
    CHANGES = """
server.PAUSE = 0
server.LENGTHS["message"] = 60_000
server.application.settings.update(websocket_max_message_size=70_000, websocket_ping_interval=0.2)"""

    def test_one_that_does_not_read_is_cut_off_and_one_that_reads_slowly_is_not(self):
        deaf, slow, ann = self.guest("Deaf", slow=True), self.guest(slow=True), self.guest("Ann")
        memory, lines = self.chat.memory("VmHWM"), []
        while "Deaf left" not in lines and len(lines) < 500:
            ann.say(f"{len(lines)}" + "x" * 59_000)
            lines.append(ann.line()["message"])
            if len(lines) % 20 == 0:  # it has been far behind
                self.assertEqual([line["message"] for line in slow.messages(20)], lines[-20:])
        self.assertIn("Deaf left", lines)
        self.assertGreater(len(lines), 4 * 1024 * 1024 // 60_000)  # 4 MiB may wait for it
        self.assertLess(self.chat.memory("VmHWM") - memory, 40)
        deaf.vanish()

    def test_under_pressure_nobody_is_closed_who_answers_pings(self):
        ann, deaf = self.guest("Ann"), self.guest("Deaf", slow=True)
        ann.until("Deaf joined")
        end, rounds, crowd = time.monotonic() + 0.8, 0, collections.deque()
        while time.monotonic() < end or rounds < 20:  # four pings
            for _ in range(4):
                crowd.append(self.guest())
                crowd[-1].say("x" * 3000, nick="Newcomer")
            ann.say(f"{rounds}")
            ann.until(f"{rounds}")  # else it is closed
            while len(crowd) > 20:
                crowd.popleft().vanish()
            rounds += 1
        deaf.vanish()

    @UNIX
    def test_a_frame_that_waits_for_many_is_in_memory_once(self):
        ann, deaf = self.guest("Ann"), [self.guest(slow=True) for _ in range(60)]
        memory = self.chat.memory("VmHWM")
        with self.chat.frozen():
            for guest in deaf:
                threading.Thread(target=guest.say, args=["x" * 60_000], daemon=True).start()
            time.sleep(0.2)
        ann.messages(60)
        ann.say("and all the others have been sent it")
        ann.until("and all the others have been sent it")
        self.assertLess(self.chat.memory("VmHWM") - memory, 100)  # 60 times 3.6 MB would be more
        for guest in deaf:
            guest.vanish()

    def test_one_that_answers_no_ping_is_closed(self):
        self.assertEqual(server.application.settings["websocket_ping_interval"], 20)  # here it is less
        ann, silent = self.guest("Ann"), self.guest("Silent")
        silent.socket.settimeout(0.05)
        said = b""
        while b"ping timed out" not in said:
            with contextlib.suppress(TimeoutError):
                said = silent.socket.recv(65536)
            ann.say("I am here")  # whereas the silent one reads its pings and says nothing
            ann.until("I am here")
        silent.vanish()
        ann.until("Silent left")


class ASignOfLife(ChatTest):
    CHANGES = "server.HEARTBEAT = 0.1"

    def test_the_server_says_something_all_the_time(self):
        self.assertEqual(server.HEARTBEAT, 10)
        ann = self.guest()
        for _ in range(3):
            self.assertEqual(json.loads(ann.text()), {"type": "list", "data": [], "online": 1})


    def test_a_flooder_that_vanishes_is_gone_although_much_of_its_flood_was_not_read(self):
        ann, flooder = self.guest("Ann"), self.guest("Flooder")
        flooder.raw(frame("") * 5000)  # 20 ms for each would be 100 seconds
        time.sleep(0.1)
        flooder.vanish()
        ann.until("Flooder left")


class ManyAtTheDoor(ChatTest):
    FILES = 64
    CHANGES = "server.TIMEOUT = 0.3"

    @UNIX
    def test_newcomers_are_refused_when_files_run_out_and_come_in_when_there_is_room(self):
        room = [self.guest("Ann")]
        while room[-1].status == 101:
            self.assertLess(len(room), 64)
            room.append(self.guest())
        self.assertGreater(len(room), 30)
        for _ in range(100):
            self.assertEqual(self.guest().status, 503)
        with self.assertRaises(urllib.error.HTTPError) as caught, urllib.request.urlopen(self.chat.url):
            pass
        self.assertEqual(caught.exception.code, 503)
        self.assertIn("full", caught.exception.read().decode())
        room[0].say("we talk on")
        self.assertEqual(room[1].said("we talk on"), ["we talk on"])
        for guest in room[-6:]:
            guest.vanish()
        while (newcomer := self.guest()).status != 101:  # the server sees them go one by one
            pass
        newcomer.say("in")
        room[0].until("in")

    def test_a_request_that_never_ends_does_not_stay_open(self):
        strangers = []
        for request in b"", b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n":
            strangers.append(socket.create_connection(("127.0.0.1", self.chat.port), WAIT))
            self.addCleanup(strangers[-1].close)
            strangers[-1].sendall(request)
        for stranger in strangers:
            while stranger.recv(65536):  # or it times out
                pass
        self.assertNotIn("Traceback", self.chat.log())
        self.chat.stop()


class ItStartsAndStops(ChatTest):
    def run_server(self, *options):
        return subprocess.run([sys.executable, HERE / "server.py", *options], capture_output=True, text=True, timeout=WAIT,
                              check=False)

    def test_it_serves_from_any_folder_on_this_machine_alone_and_says_where(self):
        with tempfile.TemporaryDirectory() as elsewhere:
            chat = self.start(cwd=elsewhere)
            self.assertIn(chat.url, chat.greeting)
            with urllib.request.urlopen(chat.url) as page:
                self.assertIn("Welcome to ScopyChat", page.read().decode())
        if sys.platform == "linux":
            self.assertNotIn(f"00000000:{chat.port:04X} 00000000:0000 0A", pathlib.Path("/proc/net/tcp").read_text())

    def test_other_addresses(self):
        for address, host in ("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("::1", "[::1]"):
            chat = self.start("--address", address)
            self.assertIn(f"http://{host}:{chat.port}/", chat.greeting)
            with urllib.request.urlopen(f"http://{host}:{chat.port}/") as page:
                self.assertEqual(page.status, 200)

    def test_wrong_options_get_a_clear_line(self):
        words = {"--port=x": "'x'", "--port=99999": "--port", "--port=-1": "--port", "--port=0": "--port", "--prot=1": "--prot",
                 "--address=no.invalid": "no.invalid", "--address=..": "..", f"--port={self.chat.port}": f"{self.chat.port}"}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for option, done in zip(words, pool.map(self.run_server, words), strict=True):
                with self.subTest(option):
                    self.assertGreater(done.returncode, 0)
                    self.assertIn(words[option], done.stderr.splitlines()[-1])
                    self.assertNotIn("Traceback", done.stderr)
        self.assertIn("--address", self.run_server("--help").stdout)

    def test_its_metadata_names_python_and_tornado(self):
        """PEP 723, for `uv run server.py`."""
        found = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", (HERE / "server.py").read_text())
        self.assertIn('requires-python = ">=3.11"', found["content"])
        self.assertIn('"tornado>=6.6"', found["content"])

    @UNIX
    def test_a_signal_ends_it_with_a_goodbye_whoever_is_there(self):
        for signum, deaf in (signal.SIGTERM, True), (signal.SIGINT, False):
            chat = self.start(changes="server.HEARTBEAT = 0.01; server.MAX_UNREAD = 10_000; server.GOODBYE = 0.3")
            anns = [self.guest(f"Ann {i}", chat) for i in range(20)]
            for _ in range(3 if deaf else 0):  # they flood, and read nothing
                flood = (frame(json.dumps(new_message("flood"))) + frame("bad")) * 10000
                threading.Thread(target=self.guest(chat=chat, slow=True).raw, args=[flood], daemon=True).start()
            for request in b"", b"GET /chat HTTP/1.1\r\n":
                silent = socket.create_connection(("127.0.0.1", chat.port))
                self.addCleanup(silent.close)
                silent.sendall(request)
            for ann in anns:
                ann.say("hello")
            anns[0].messages(20)
            chat.process.send_signal(signum)
            for ann in anns:
                self.assertEqual(ann.closing(), (1001, "the server stops"))
            self.assertEqual(chat.stop(None), (0, ""))

    @UNIX
    def test_who_comes_in_during_the_goodbye_is_told_goodbye(self):
        here, newcomer = self.guest("Ann"), socket.create_connection(("127.0.0.1", self.chat.port), WAIT)
        self.addCleanup(newcomer.close)
        newcomer.sendall(b"GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n")
        self.guest("Bob").socket.close()  # when it has come, the newcomer's first half has arrived
        self.chat.process.send_signal(signal.SIGTERM)
        newcomer.settimeout(WAIT)
        while b"stops" not in here.socket.recv(4096):  # and it does not answer
            pass
        newcomer.sendall(b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
        said = b""
        while b"\x03\xe9the server stops" not in said:
            said += newcomer.recv(4096) or self.fail(said)
        here.socket.close()
        newcomer.close()
        self.assertEqual(self.chat.stop(None), (0, ""))

    @UNIX
    def test_what_was_accepted_is_delivered_before_the_goodbye(self):
        for _ in range(2):
            chat = self.start()
            guests = [self.guest(chat=chat) for _ in range(5)]
            for guest in guests:
                guest.frame()
            with chat.frozen():
                for i, guest in enumerate(guests):
                    guest.send(new_message(f"{i}"))
                chat.process.send_signal(signal.SIGTERM)
            for guest in guests:
                with self.assertRaisesRegex(AssertionError, "the server stops"):
                    while True:
                        guest.line()
            heard = [[data for data in guest.heard if "online" not in data] for guest in guests]
            self.assertEqual(heard, [heard[0]] * 5)
            self.assertEqual(sum(len(data.get("data", [1])) for data in heard[0]), 5)
            self.assertEqual(chat.stop(None), (0, ""))


class WhatAReaderBreaksShows(ChatTest):
    """With a traceback in the log, while everybody stays connected."""

    def broken(self, changes):
        self.chat = Chat(changes=f"def broken(*args, **kwargs):\n    raise TypeError('a mistake')\n{changes}")
        self.assertTrue(self.chat.greeting)
        self.addCleanup(self.chat.stop, KILL)

    def logged(self, count=1):
        for _ in range(WAIT * 100):
            if self.chat.log().count("TypeError: a mistake") >= count:
                return self.chat.log()
            time.sleep(0.01)
        raise AssertionError(self.chat.log())

    def test_in_a_handler(self):
        for name in "open", "on_message", "on_close":
            with self.subTest(name):
                self.broken(f"server.WSHandler.{name} = broken")
                guest = self.guest()
                guest.raw(frame(json.dumps(new_message("hi"))))
                guest.socket.close()
                self.assertIn("Traceback", self.logged())

    def test_in_get_and_in_a_route(self):
        self.broken("server.MainHandler.get = broken")
        with self.assertRaises(urllib.error.HTTPError):
            urllib.request.urlopen(self.chat.url)
        self.assertIn("Traceback", self.logged())
        self.broken("server.application.add_handlers('.*', [('/chat/(.*)', server.WSHandler)])")
        with socket.create_connection(("127.0.0.1", self.chat.port), WAIT) as guest:
            guest.sendall(b"GET /chat/x HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                          b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
            while guest.recv(65536):
                pass
        self.assertIn("open() takes 1 positional argument", self.chat.log())

    def test_in_a_broadcast_or_a_flush_and_nobody_is_closed_or_blamed(self):
        for name in "broadcast", "flush":
            with self.subTest(name):
                self.broken(f"server.{name} = broken")
                guest = self.guest()
                guest.frame()
                for i in range(3):
                    guest.say("hi")
                    guest.send({"type": "nonsense"})
                    self.assertEqual(guest.frame()["message"][:8], "The type")
                self.assertIn("Traceback", self.logged())


# ---- The page ----------------------------------------------------------------------------------------------------------


class Proxy:
    """The network between the browser and the server.  It can break all connections, refuse new ones, or go dead."""

    def __init__(self, target):
        self.target, self.ends, self.accepted = target, [], 0
        self.refuses = False  # whether it ends new connections at once
        self.dead = False     # whether it swallows all that is sent through it, and says nothing
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                self.accepted += 1
                try:
                    far = None if self.refuses else socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    far = None
                if far is None:
                    near.close()
                    continue
                self.ends.append((near, far))
                for pair in (near, far), (far, near):
                    threading.Thread(target=self.pump, args=pair, daemon=True).start()

    def pump(self, source, target):
        swallows = False
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                swallows = swallows or self.dead
                if not swallows:
                    target.sendall(data)
        for end in source, target:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self, ends=None):
        """Reset a connection, or all."""
        for pair in [ends] if ends else list(self.ends):
            self.ends.remove(pair)
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RD)
                end.close()

    def close(self):
        self.listener.close()
        self.cut()


@functools.cache
def browser():
    """Return a Chromium for all tests."""
    playwright = sync_playwright().start()
    unittest.addModuleCleanup(playwright.stop)
    chromium = playwright.chromium.launch(
        executable_path=CHROMIUM, args=["--no-sandbox", "--disable-features=LocalNetworkAccessChecks"])
    unittest.addModuleCleanup(chromium.close)
    return chromium


@functools.cache
def windows(jquery=None, test=None, **options):
    """Return a context for windows: a shared one, or one for this test alone, with Playwright's options."""
    context = browser().new_context(**options)
    context.set_default_timeout(WAIT * 1000)
    context.route("https://code.jquery.com/**", lambda route: route.fulfill(
        body=JQUERY.read_bytes() if jquery is None else jquery, content_type="text/javascript", headers={"Access-Control-Allow-Origin": "*"}))
    return context


class PageTest(ChatTest):
    """A test with windows of a real browser, which reach the server through a proxy."""

    def setUp(self):
        need(sync_playwright, "Playwright", "pip install playwright")
        need(CHROMIUM, "Chromium", "install your system's package, on Debian `apt-get install chromium`")
        need(JQUERY.exists() and AXE.exists(), "jQuery or axe-core", "npm install --prefix .ci jquery@4.0.0 axe-core@4")
        super().setUp()
        self.proxy = Proxy(self.chat.port)
        self.addCleanup(self.proxy.close)
        self.errors = []
        self.addCleanup(lambda: self.assertEqual(self.errors, []))

    def window(self, nick=None, clock=None, change=None, size=None, url=None, **options):
        """Return a page, in which this nick has joined.  change is a function of the page's text."""
        context = windows(test=clock and self.id(), **options)
        page = context.new_page()
        self.addCleanup(page.close)
        if clock:
            page.clock.install(time=clock)
        if size:
            page.set_viewport_size({"width": size[0], "height": size[1]})
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        if change:
            page.route("**/", lambda route: route.fulfill(
                body=change(route.fetch().text()), content_type="text/html"))
        page.goto(url or f"http://localhost:{self.proxy.port}/")
        page.evaluate("window.jQuery && new Promise(ready => jQuery(ready))")
        if nick:
            self.join(page, nick)
        return page

    def join(self, page, nick):
        page.get_by_label("Nick").fill(nick)
        page.get_by_label("Nick").press("Enter")
        self.shows(page, f"{nick.strip()} joined")

    def post(self, page, *messages):
        for message in messages:
            page.get_by_label("Post as").fill(message)
            page.get_by_label("Post as").press("Enter")

    def shows(self, page, text):
        """Wait until the log has a line with this text."""
        page.locator("#chat li", has_text=text).last.wait_for(state="attached")

    def said(self, page):
        """Return what people have said, as the page has it."""
        return page.locator("#chat li:has(time) > p:last-child").all_text_contents()

    def runs(self, page, condition, seconds=60):
        """Let the clock of a page run until a condition is true."""
        for _ in range(0, seconds, 3):
            if page.evaluate(condition):
                return
            page.clock.run_for(3000)
            page.wait_for_timeout(20)  # what was sent meanwhile arrives
        raise AssertionError(f"after {seconds} s: {page.locator('main').inner_text()}")

    def at_end(self, page):
        return page.evaluate("(([log]) => log.scrollHeight - log.scrollTop - log.clientHeight < 2)(jQuery('#log'))")


CONNECTED = "() => jQuery('#status').text() === 'Connected'"
DISCONNECTED = "() => jQuery('#status').text().startsWith('Disconnected')"


class ThePageTalks(PageTest):
    CHANGES = "server.HEARTBEAT = 0.2"

    def test_two_windows_talk_and_markup_is_text(self):
        ann = self.window()
        self.assertRegex(ann.get_by_label("Nick").input_value(), r"^User\d+$")
        self.assertTrue(ann.evaluate("jQuery.fn.jquery === '4.0.0'"))
        self.join(ann, "  Ann ")
        expect(ann.get_by_text("Post as Ann", exact=True)).to_be_visible()
        expect(ann.locator("#login")).to_be_hidden()
        self.shows(ann, "chat server connected")
        self.post(ann, "hello", "   ", "", "<img src=x onerror=alert(1)><b>bold</b>")
        bob = self.window("<img src=x>")
        self.shows(bob, "<b>bold</b>")
        self.post(bob, "hi Ann")
        self.shows(ann, "hi Ann")
        for page in ann, bob:
            self.assertEqual(self.said(page), ["hello", "<img src=x onerror=alert(1)><b>bold</b>", "hi Ann"])
            self.shows(page, "<img src=x> joined")
            expect(page.locator("#chat img, #chat p b b")).to_have_count(0)
            expect(page.get_by_text("2 online")).to_be_visible()
            expect(page.get_by_text("sending")).to_have_count(0)
        self.assertRegex(ann.locator("#chat li", has_text="hi Ann").inner_text(), r"<img src=x> \d+:\d\d.*\s+hi Ann")
        bob.close()
        self.shows(ann, "<img src=x> left")
        expect(ann.get_by_text("1 online")).to_be_visible()

    def test_everything_by_keyboard_the_caret_stays_in_the_box_and_a_reload_knows_the_nick(self):
        page = self.window()
        page.keyboard.type("Ann\nhi\n")
        self.shows(page, "hi")
        page.get_by_label("Post as").fill("by a click")
        page.get_by_role("button", name="Post").click()
        self.shows(page, "by a click")
        page.keyboard.type("and the caret is there\n")
        self.shows(page, "the caret is there")
        page.keyboard.press("Shift+Tab")
        expect(page.get_by_role("region", name="Conversation")).to_be_focused()  # the arrow keys scroll it
        page.reload()
        expect(page.get_by_label("Nick")).to_have_value("Ann")
        expect(self.window().get_by_label("Nick")).not_to_have_value("Ann")

    def test_markup_could_not_run_even_if_it_got_into_the_page(self):
        page = self.window()
        page.evaluate("""() => {
            window.refused = [];
            document.addEventListener('securitypolicyviolation', evt => window.refused.push(evt.effectiveDirective));
            const add = (name, attributes) => document.body.append(Object.assign(document.createElement(name), attributes));
            document.getElementById('chat').innerHTML = '<img src="x"><b onclick="window.ran = 1">b</b>';
            document.querySelector('#chat b').click();
            add('script', {textContent: 'window.ran = 2'});
            add('script', {src: '/evil.js'});
            add('base', {href: 'https://example.com/'});
            add('style', {textContent: '* { display: none }'});
            add('iframe', {src: '/'});
            add('form', {action: '/evil'});
            document.body.lastChild.submit();
            fetch('https://example.com/').catch(() => {});
        }""")
        names = {"img-src", "script-src-attr", "script-src-elem", "base-uri", "style-src-elem", "frame-src", "form-action",
                 "connect-src"}
        page.wait_for_function("count => new Set(window.refused).size >= count", arg=len(names))
        self.assertEqual(set(page.evaluate("window.refused")), names)
        self.assertTrue(page.evaluate("window.ran === undefined"))

    def test_what_is_typed_is_sent_whole_or_refused_in_words(self):
        ann, bob = self.window(change=lambda text: text.replace("message: 1000", "message: 1100")), self.guest("Bob")
        box = ann.get_by_label("Nick")
        box.fill("x" * 31)
        ann.get_by_role("button", name="Join").click()
        expect(ann.get_by_text("31 characters are too many")).to_be_visible()
        self.join(ann, "Ann")
        box = ann.get_by_label("Post as")
        box.fill("x" * 2007)
        box.press("Enter")
        expect(ann.get_by_text("2007 characters are too many: 1100 is the limit")).to_be_visible()
        self.assertEqual(box.input_value(), "x" * 2007)
        self.assertTrue(self.at_end(ann))
        box.fill("x")
        expect(ann.get_by_text("too many")).to_have_count(0)
        ann.evaluate(r"jQuery('#message').val('a\x07b\x1bc\x9fd')")
        box.press("Enter")
        self.post(ann, "😀" * 1000)
        self.assertEqual(bob.said("😀" * 1000), ["a b c d", "😀" * 1000])
        self.post(ann, "refuse me " * 110)  # which it is, by the server
        refused = ann.locator("#chat li.error", has_text="Not sent: refuse me refuse me")
        expect(refused).to_contain_text("1 to 1,000")
        expect(ann.get_by_text("sending")).to_have_count(0)
        ann.wait_for_timeout(500)  # two heartbeats
        expect(refused).to_have_count(1)

    def test_without_jquery_it_says_so(self):
        for jquery in b"", JQUERY.read_bytes() + b" ":  # nothing came; not what we asked for, by its integrity
            page = self.window(jquery=jquery)
            expect(page.get_by_role("status")).to_contain_text("needs jQuery")
            self.errors.clear()


class ThePageIsGoodToRead(PageTest):
    CHANGES = "server.PAUSE = 0"

    def test_names_days_links_colours_and_scripts(self):
        ann, bob, user50, user51 = self.window("Ann"), *map(self.guest, ("Bob", "User50", "User51"))
        words = "see http://a.example/?b=(c), (https://b.example/d.) or HTTPS://C.EXAMPLE; not javascript:alert(1) or ftp://d"
        for i, (guest, message) in enumerate([
                (bob, "one"), (bob, "two  spaces\nand a break"), (user50, "fifty"), (user51, "fifty-one"), (bob, words),
                (bob, "مرحبا Bob!")]):
            guest.say(message)
            expect(ann.locator("#chat li:has(time)")).to_have_count(i + 1)
        self.post(ann, "own")
        self.shows(ann, "own")

        expect(ann.locator("#chat b", has_text="Bob").nth(0)).to_be_visible()
        expect(ann.locator("#chat b", has_text="Bob").nth(1)).to_be_hidden()  # it is said in the line above
        expect(ann.locator("#chat b", has_text="Bob").nth(2)).to_be_visible()
        text = ann.evaluate("getSelection().selectAllChildren(jQuery('#chat')[0]), getSelection().toString()")  # a copy
        self.assertRegex(text, r"Bob \d+:\d\d.*\s+one\s+two  spaces\nand a break\s+User50 \d+:\d\d.*\s+fifty\s+User51 \d")
        links = ann.locator("#chat a")
        self.assertEqual([link.get_attribute("href") for link in links.all()],
                         ["http://a.example/?b=(c", "https://b.example/d", "HTTPS://C.EXAMPLE"])
        self.assertEqual(self.said(ann)[4], words)
        for name, value in ("rel", "noreferrer"), ("target", "_blank"):
            expect(links.first).to_have_attribute(name, value)
        direction = "document.defaultView.getComputedStyle(jQuery('#chat p:contains(' + %r + ')').last()[0]).direction"
        self.assertEqual([ann.evaluate(direction % word) for word in ("مرحبا", "fifty")], ["rtl", "ltr"])
        for scheme in "light", "dark":
            ann.emulate_media(color_scheme=scheme)
            hues = [float(ann.locator("b", has_text=nick).evaluate("b => getComputedStyle(b).color").split()[-1].strip(")"))
                    for nick in ("User50", "User51")]
            self.assertGreater((hues[0] - hues[1]) % 360, 60)
            self.assertGreater((hues[1] - hues[0]) % 360, 60)

        time_of_one = ann.locator("#chat time").first
        self.assertAlmostEqual(datetime.datetime.fromisoformat(time_of_one.get_attribute("datetime")).timestamp(),
                               time.time(), delta=60)
        self.assertIn(f"{time.localtime().tm_year}", time_of_one.get_attribute("title"))
        year = f"{time.localtime().tm_year}"
        expect(ann.locator("#chat li", has_text=year)).to_have_count(0)
        tomorrow = self.window("Tom", clock=time.time() + 86400)
        self.assertRegex(tomorrow.locator("#chat li").nth(0).inner_text() + tomorrow.locator("#chat li").nth(1).inner_text(),
                         year)
        expect(tomorrow.locator("#chat li", has_text=year)).to_have_count(1)

    def test_a_reader_gets_away_from_the_end_and_back(self):
        ann, bob = self.window("Ann", size=(800, 500)), self.guest("Bob")
        for i in range(60):
            bob.say(f"line {i}.")
        expect(ann.locator("#chat li", has_text="line 59.")).to_be_in_viewport(ratio=1)
        ann.locator("#log").hover()
        for i in range(60, 66):  # while the room talks on
            ann.mouse.wheel(0, -40)
            bob.say(f"line {i}.")
            self.shows(ann, f"line {i}.")
        self.assertFalse(self.at_end(ann))
        expect(ann.get_by_role("button", name=re.compile(r"^[456] new lines"))).to_be_visible()
        ann.get_by_role("button", name="new lines").click()
        self.assertTrue(self.at_end(ann))
        expect(ann.get_by_role("button", name="new line")).to_be_hidden()
        ann.keyboard.type("the caret is in the box\n")
        self.shows(ann, "the caret is in the box")
        ann.evaluate("jQuery('#log').scrollTop(0)")
        bob.say("one more")
        expect(ann.get_by_role("button", name="1 new line ")).to_be_visible()
        self.post(ann, "whoever posts wants to see it")
        expect(ann.locator("#chat li", has_text="wants to see it")).to_be_in_viewport(ratio=1)
        self.post(ann, "x" * 2007)
        expect(ann.get_by_text("too many")).to_be_visible()  # a hint, which takes room from the log
        expect(ann.locator("#chat li", has_text="wants to see it")).to_be_in_viewport(ratio=1)
        ann.set_viewport_size({"width": 800, "height": 250})  # a keyboard comes up
        expect(ann.locator("#chat li", has_text="wants to see it")).to_be_in_viewport(ratio=1)

    def test_500_rows_stay_and_the_readers_place_too(self):
        ann, bob = self.window("Ann", size=(800, 500)), self.guest("Bob")
        for i in range(520):
            bob.say(f"line {i}.")
        self.shows(ann, "line 519.")
        self.assertEqual(ann.locator("#chat li").count(), 500)
        place = ann.locator("#chat li", has_text="line 300.")
        place.scroll_into_view_if_needed()
        top = place.bounding_box()["y"]
        for i in range(520, 600):
            bob.say(f"line {i}.")
        self.shows(ann, "line 599.")
        self.assertEqual(self.said(ann), [f"line {i}." for i in range(100, 600)])
        self.assertAlmostEqual(place.bounding_box()["y"], top, delta=3)

    def test_a_burst_is_drawn_little_by_little(self):
        ann = self.window("Ann")
        most = ann.evaluate("""() => new Promise(done => {
            const added = [], list = [];
            new MutationObserver(records => added.push(records.flatMap(record => [...record.addedNodes]).length))
                .observe(jQuery('#chat')[0], {childList: true});
            for (let i = 0; i < 1000; i++) {
                list.push({type: 'message', id: 'burst' + i, nick: 'Bob', message: 'line ' + i, time: Date.now() / 1000});
            }
            list.push({type: 'message', message: 'Cleo joined', time: Date.now() / 1000, online: 77});
            ws.onmessage({data: JSON.stringify({type: 'list', data: list})});
            (function wait() {
                jQuery('#chat li').last().text().includes('Cleo joined') ? done(Math.max(...added)) : setTimeout(wait, 20);
            })();
        })""")
        self.assertLess(most, 150)
        self.assertEqual(self.said(ann), [f"line {i}" for i in range(501, 1000)])
        expect(ann.get_by_text("77 online")).to_be_visible()

    def test_a_hidden_tab_counts_and_keeps_only_what_it_will_show(self):
        ann, bob = self.window("Ann"), self.guest("Bob")
        self.shows(ann, "Bob joined")
        ann.evaluate("""() => {  // as in a hidden tab: no repaint
            window.due = [];
            window.requestAnimationFrame = draw => window.due.push(draw);
            Object.defineProperty(document, 'hidden', {value: true, configurable: true});
            document.dispatchEvent(new Event('visibilitychange'));
        }""")
        for i in range(800):
            bob.say(f"line {i}")
        ann.wait_for_function("() => document.title === '(800) ScopyChat'", polling=50)
        self.assertEqual(self.said(ann), [])
        ann.evaluate("""() => {
            delete document.hidden;
            document.dispatchEvent(new Event('visibilitychange'));
            for (let i = 0; i < window.due.length; i++) { window.due[i](); }
        }""")
        self.assertEqual(self.said(ann), [f"line {i}" for i in range(300, 800)])
        self.assertEqual(ann.title(), "ScopyChat")

    def test_with_a_screen_reader(self):
        bob = self.guest("Bob")
        for i in range(30):
            bob.say(f"history {i}")
        bob.until("history 29")
        ann = self.window()
        ann.evaluate("""() => {
            const log = document.querySelector('[role=log]');
            window.read = [];
            new MutationObserver(records => records.forEach(record => record.addedNodes.forEach(
                node => log.ariaLive === 'off' || window.read.push(node.textContent)))).observe(log, {childList: true, subtree: true});
            window.states = [];
            new MutationObserver(() => window.states.push(jQuery('[role=status]').text())).observe(
                document.querySelector('[role=status]'), {childList: true, subtree: true, characterData: true});
        }""")
        self.join(ann, "Ann")
        self.shows(ann, "history 29")
        ann.wait_for_function("() => document.querySelector('[role=log]').ariaLive === 'polite'")
        self.post(ann, "my own line")
        for i in range(30):
            bob.say(f"busy {i}")
        guests = [self.guest(f"Guest {i}") for i in range(5)]
        for guest in guests:
            guest.socket.close()
        self.shows(ann, "Guest 4 left")
        self.shows(ann, "my own line")
        read = ann.evaluate("window.read")
        self.assertFalse([text for text in read if "history" in text])
        self.assertTrue(1 <= len([text for text in read if "my own line" in text]) <= 2)
        self.assertEqual(ann.evaluate("window.states"), ["Connected"])

    def test_on_small_and_odd_screens_and_axe_finds_nothing(self):
        page = self.window(size=(320, 568), bypass_csp=True)  # for axe, which is a script
        page.add_script_tag(path=AXE)

        def check():
            for scheme in "light", "dark":
                page.emulate_media(color_scheme=scheme)
                self.assertEqual(page.evaluate("async () => (await axe.run()).violations.map("
                                               "v => v.id + ': ' + v.nodes.map(n => n.html).join())"), [])

        check()
        self.join(page, "W" * 30)
        bot = self.guest("Bot")
        bot.say("W" * 99)
        page.evaluate("ws.send('bad')")
        expect(page.locator("#chat li.error")).to_be_in_viewport()
        for i in range(30):  # nicks of every colour
            self.guest(f"User{i}").say("the last line")
        expect(page.locator("#chat b")).to_have_count(31)
        box = page.locator("#log").bounding_box()
        check()
        self.proxy.refuses = True
        self.proxy.cut()
        self.post(page, "on its way")
        expect(page.get_by_text("Disconnected:", exact=False).first).to_be_in_viewport()
        self.assertEqual(page.locator("#log").bounding_box(), box)
        check()
        page.emulate_media(forced_colors="active")
        self.assertNotIn(page.get_by_role("button", name="Post").evaluate("b => getComputedStyle(b).border"), ["0px", "none"])
        for width, height, lines in (320, 568, 5), (320, 256, 1), (740, 180, 2):  # 256: a desktop's window at 400 %
            page.set_viewport_size({"width": width, "height": height})
            self.assertLessEqual(page.evaluate("document.documentElement.scrollWidth"), width)
            self.assertEqual(page.evaluate("document.documentElement.scrollHeight"), height)
            for part in page.get_by_label("Post as"), page.get_by_role("button", name="Post"), page.get_by_text("on its way"):
                expect(part).to_be_in_viewport(ratio=1)
            seen = page.locator("#log li .text").evaluate_all("""texts => texts.filter(text => {
                const box = text.getBoundingClientRect(), middle = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
                return text.contains(document.elementFromPoint(...middle)); }).length""")
            self.assertGreaterEqual(seen, lines, (width, height))


class ThePageLosesNothing(PageTest):
    CHANGES = "server.PAUSE = 0"

    def test_what_is_posted_while_the_server_is_away_is_said_in_order_when_it_is_back(self):
        ann, bob = self.window("Ann"), self.window("Bob")
        self.post(ann, "before")
        self.shows(bob, "before")
        port = self.chat.port
        self.assertEqual(self.chat.stop(), (0, ""))
        self.shows(ann, "chat server disconnected: the server stops (1001)")
        expect(ann.get_by_role("status")).to_contain_text("Next attempt in")
        self.post(ann, "meanwhile", "and this")
        expect(ann.get_by_text("sending")).to_have_count(2)
        self.start(port=port)
        ann.evaluate("""() => {  // what the server says takes its time
            window.WebSocket = class extends WebSocket {
                set onmessage(heard) { super.onmessage = heard && (evt => setTimeout(() => heard(evt), 300)); }
            };
        }""")
        for page in bob, ann:
            page.evaluate("window.dispatchEvent(new Event('focus'))")  # somebody looks at it: it tries at once
        ann.wait_for_function("() => ws.readyState === 1")
        self.post(ann, "and now")  # before the history has come
        for page in ann, bob:
            self.shows(page, "and now")
            self.assertEqual(self.said(page), ["before", "meanwhile", "and this", "and now"])
            expect(page.get_by_text("may be missing")).to_have_count(0)
        cleo, heard = self.guest(), set()  # the new server is told again what was said just before
        while not {"before", "meanwhile", "and this", "and now"} <= heard:
            heard.add(cleo.line()["message"])

    def test_a_dead_network_is_noticed_and_given_up_and_when_it_is_back_the_page_is_too(self):
        ann, bob = self.window("Ann", clock=time.time()), self.guest("Bob")
        self.proxy.dead = True
        self.runs(ann, DISCONNECTED, 45)  # it only reads
        self.post(ann, "can you hear me?")
        dead = self.proxy.accepted
        for _ in range(100):
            if self.proxy.accepted > dead + 1:  # an attempt that meets silence is not the last one
                break
            ann.clock.run_for(3000)
        self.assertGreater(self.proxy.accepted, dead + 1)
        self.proxy.dead = False
        self.runs(ann, CONNECTED)
        self.shows(ann, "can you hear me?")
        bob.until("can you hear me?")
        accepted = self.proxy.accepted
        for ends in list(self.proxy.ends)[:-1]:  # the dead connections end at last
            self.proxy.cut(ends)
        bob.say("go on")
        self.shows(ann, "go on")
        ann.clock.run_for(5000)
        self.assertTrue(ann.evaluate(CONNECTED))
        self.assertEqual((self.said(ann), self.proxy.accepted), (["can you hear me?", "go on"], accepted))

    def test_a_line_is_said_again_with_each_sign_of_life_until_it_comes_back(self):
        self.chat.stop()
        self.chat = self.start(changes="server.HEARTBEAT = 0.2", port=self.chat.port)
        ann, bob = self.window("Ann"), self.guest("Bob")
        ann.evaluate("ws.send = (send => text => { ws.send = send; })(ws.send.bind(ws))")  # the next line gets lost
        self.post(ann, "once")
        self.shows(ann, "once")
        bob.until("once")

    def test_missed_messages_are_filled_in_or_owned_up_to(self):
        ann, bob = self.window("Ann"), self.guest("Bob")
        self.post(ann, "here")
        bob.until("here")
        for count, gap in (50, 0), (150, 1):
            self.proxy.refuses = True
            self.proxy.cut()
            ann.wait_for_function(DISCONNECTED)
            for i in range(count):
                bob.say(f"{count}-{i}")
            bob.until(f"{count}-{count - 1}")
            self.proxy.refuses = False
            ann.evaluate("window.dispatchEvent(new Event('online'))")
            self.shows(ann, f"{count}-{count - 1}")
            expect(ann.get_by_text("messages may be missing here")).to_have_count(gap)
        self.assertEqual(self.said(ann), ["here", *(f"50-{i}" for i in range(50)), *(f"150-{i}" for i in range(50, 150))])

    def test_nothing_is_lost_or_doubled_on_a_network_that_fails_and_a_server_that_restarts(self):
        chance = random.Random(20121203)
        pages = [self.window(nick) for nick in ("Ann", "Bob")]
        posted = []
        for i in range(24):
            posted.append(f"line {i}.")
            self.post(chance.choice(pages), posted[-1])
            if chance.random() < 0.3 and self.proxy.ends:
                self.proxy.cut(chance.choice(self.proxy.ends))
            if i == 10:
                self.assertEqual(self.chat.stop(), (0, ""))
            if i == 15:
                self.chat = self.start(port=self.chat.port)
        for page in pages:
            page.evaluate("window.dispatchEvent(new Event('online'))")
        for page in pages:
            expect(page.locator("#chat li:has(time)")).to_have_count(len(posted))
            expect(page.get_by_text("sending")).to_have_count(0)
            self.assertEqual(sorted(self.said(page)), sorted(posted))

    def test_pauses_grow_and_shrink_only_after_a_connection_that_has_lasted(self):
        ann = self.window("Ann", clock=time.time())
        ann.evaluate("Math.random = () => 0.999")

        ann.clock.pause_at(time.time() + 5)
        pauses = []

        def pause():
            ann.wait_for_function(DISCONNECTED)
            pauses.append(int(re.search(r"in (\d+) s", ann.get_by_role("status").inner_text())[1]))
            ann.evaluate("jQuery('#status').text('')")
            return pauses[-1]

        def fails():
            """Let the next attempt fail, and return the pause after it."""
            ann.clock.run_for(1000 * pauses[-1])
            return pause()

        self.proxy.refuses = True
        self.proxy.cut()
        self.assertEqual([pause(), fails(), fails()], [1, 2, 4])
        ann.evaluate("window.dispatchEvent(new Event('focus'))")  # it tries once more
        self.assertEqual([pause(), *(fails() for _ in range(4))], [4, 8, 16, 30, 30])
        self.proxy.refuses = False
        ann.evaluate("window.dispatchEvent(new Event('online'))")
        ann.wait_for_function(CONNECTED)
        self.proxy.cut()  # it has not lasted
        self.assertEqual(pause(), 30)
        self.chat.stop()
        self.chat = self.start(changes="server.HEARTBEAT = 0.1", port=self.chat.port)
        ann.evaluate("window.dispatchEvent(new Event('online'))")
        ann.wait_for_function(CONNECTED)
        ann.wait_for_timeout(500)  # some heartbeats
        self.proxy.cut()
        self.assertEqual(pause(), 1)

    def test_it_asks_before_a_window_with_an_unsent_line_closes(self):
        ann, asked = self.window("Ann"), []
        ann.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
        self.proxy.refuses = True
        self.proxy.cut()
        self.post(ann, "wait for me")
        ann.close(run_before_unload=True)
        ann.wait_for_timeout(200)
        self.assertEqual((asked, ann.is_closed()), (["beforeunload"], False))
        self.proxy.refuses = False
        ann.evaluate("window.dispatchEvent(new Event('online'))")
        self.shows(ann, "wait for me")
        with ann.expect_event("close"):
            ann.close(run_before_unload=True)
        self.assertEqual(len(asked), 1)


# ---- The README --------------------------------------------------------------------------------------------------------


class TheReadme(PageTest):
    """What it says is so, and what it tells a reader to run, runs.  `.ci/run` runs its first two commands."""

    TEXT = (HERE / "README.md").read_text() if (HERE / "README.md").exists() else ""

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def block(self, language, containing):
        """Return the one code block in this language that contains this."""
        found = [block for block in re.findall(rf"(?ms)^```{language}\n(.*?)^```$", self.TEXT) if containing in block]
        self.assertEqual(len(found), 1, f"{language} {containing}")
        return found[0]

    def spawn(self, *command, port=None, **more):
        """Start a program; when the test ends, so does the program.  Wait until it listens on a port."""
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)
        self.addCleanup(process.wait, WAIT)
        self.addCleanup(process.terminate)
        for _ in range(WAIT * 50):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                return process
            time.sleep(0.02)
        raise AssertionError(f"{command} does not listen")

    def test_its_two_commands_end_as_they_must(self):
        self.assertTrue(self.block("sh", "&& python server.py").strip().endswith("&& python server.py"))
        self.assertTrue(self.block("sh", "unittest").strip().endswith("&& python -m unittest"))

    def test_what_it_points_to_and_quotes_is_there(self):
        script, page = (HERE / "server.py").read_text(), (HERE / "test.html").read_text()
        self.assertTrue(self.block("python", "def flush").strip() in script, "not what the script has")
        for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)#\"]+)", self.TEXT):
            self.assertTrue("://" in target or (HERE / target).exists(), target)
        for name in re.findall(r"`([A-Za-z_]{4,})`", self.TEXT.partition("## Beside")[0] + self.TEXT.partition("## Exer")[2]):
            self.assertRegex(script + page, rf"\b{name}\b")

    def test_the_chat_from_the_command_line(self):
        need(ClientProtocol, "websockets", "pip install websockets")
        command, *shown = self.block("console", "-m websockets").splitlines()
        chat = self.start()
        command = [sys.executable, *command.replace("8888", str(chat.port)).split()[1:]]
        typed = "".join(line[2:] + "\n" for line in shown if line.startswith("> "))
        printed = []
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            for line in shown:
                if line.startswith("> "):
                    client.stdin.write(line[2:] + "\n")
                    client.stdin.flush()
                    continue
                text = ""
                while not text:  # it moves the cursor about
                    text = re.sub(r"\x1b[78]|\x1b\[\w|[\r\n>]", "", client.stdout.readline() or self.fail(printed)).strip()
                printed.append(text)
            client.communicate()
        blurred = [[re.sub(r'"time": [\d.]+|"id": "[^"]+"|:\d+/chat', "", line) for line in lines]
                   for lines in (printed, [line for line in shown if not line.startswith("> ")])]
        self.assertTrue(typed)
        self.assertEqual(*blurred)

    def test_behind_a_proxy_with_tls(self):
        need(shutil.which("caddy"), "Caddy", "install your system's package, on Debian `apt-get install caddy`")
        super().setUp()
        port = free_port()
        config = self.block("caddyfile", "reverse_proxy").replace("chat.example.com", f"localhost:{port}")
        config = config.replace("8888", str(self.chat.port)).replace("{", "{\n\ttls internal", 1)
        (self.folder / "Caddyfile").write_text(
            "{\n\tadmin off\n\tskip_install_trust\n\tauto_https disable_redirects\n}\n" + config)
        self.spawn("caddy", "run", "--config", self.folder / "Caddyfile", port=port,
                   env={**os.environ, "XDG_DATA_HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder)})
        bob = self.guest("Bob")
        ann = self.window("Ann", url=f"https://localhost:{port}/", ignore_https_errors=True)
        self.post(ann, "through the proxy")
        bob.until("through the proxy")
        self.assertEqual(ann.evaluate("ws.url"), f"wss://localhost:{port}/chat")

    def test_one_room_in_two_processes(self):
        need(ClientProtocol, "websockets", "pip install websockets")
        need(shutil.which("redis-server"), "Redis", "install your system's package, on Debian `apt-get install redis-server`")
        need(importlib.util.find_spec("redis"), "redis for Python", "pip install redis")
        recipe, port = self.block("python", "import server"), free_port()
        self.assertLessEqual(len(recipe.splitlines()), 40)
        (self.folder / "scale.py").write_text(recipe)

        def start_redis():
            return self.spawn("redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes",
                              "--appendfsync", "always", port=port, cwd=self.folder)

        def start(count):
            env = {**os.environ, "REDIS_URL": f"redis://localhost:{port}", "PYTHONPATH": str(HERE)}
            with concurrent.futures.ThreadPoolExecutor() as pool:
                chats = list(pool.map(lambda _: self.start(script=self.folder / "scale.py", env=env), range(count)))
            return chats, [self.guest(nick, chat) for chat, nick in zip(chats, ("Ann", "Bob"), strict=False)]

        redis, (chats, (ann, bob)) = start_redis(), start(2)
        ann.until("Bob joined")
        for i in range(20):
            ann.say(f"a{i}", id=f"a{i}")
            bob.say(f"b{i}", id=f"b{i}")
        for guest in ann, bob:
            guest.say("twice", id="twice")
        ann.say("the end")
        said = ann.said("the end")
        self.assertEqual(bob.said("the end")[-len(said):], said)
        self.assertEqual(sorted(said), sorted([f"{who}{i}" for who in "ab" for i in range(20)] + ["twice", "the end"]))

        redis.terminate()
        redis.wait()
        ann.say("in vain", id="in vain")
        redis = start_redis()
        bob.socket.settimeout(0.2)
        heard = []
        while "in vain" not in heard:  # as a page says it, again and again
            ann.say("in vain", id="in vain")
            with contextlib.suppress(TimeoutError):
                heard += bob.said("in vain")
        for guest, chat in zip((ann, bob), chats, strict=True):
            guest.vanish()
            self.assertEqual(chat.stop(), (0, ""))
        (chat,), (guest,) = start(1)
        guest.vanish()
        history = []
        while "in vain" not in history:  # it is still reading the stream
            newcomer = self.guest(chat=chat)
            history = [line["message"] for line in newcomer.frame()["data"]]
            newcomer.vanish()
        self.assertEqual(history, [*said, "in vain"])
        self.assertEqual(chat.stop(), (0, ""))


if __name__ == "__main__":
    unittest.main()
