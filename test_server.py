"""What the chat promises, seen from outside: over HTTP, a socket, a browser, and in the server's exit and log.

`python -m unittest` runs all of it.  Each test has a server process of its own.  What a test needs and cannot find is a
reason to skip it, and the reason says how to get it; `.ci/run` gets everything, and with CI=true nothing is skipped.
"""
import collections
import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import random
import re
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
MODULES = HERE / ".ci/node_modules"
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

    def __init__(self, *options, changes=None, port=None, files=None, **more):
        self.port, self.log_file = port or free_port(), tempfile.TemporaryFile("w+")
        script = [HERE / "server.py"]
        if changes:
            script = ["-c", f"import asyncio, server\n{changes}\nasyncio.run(server.main())"]
        limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
        self.process = subprocess.Popen(
            [sys.executable, *script, f"--port={self.port}", *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=self.log_file, text=True, preexec_fn=limit, **{"cwd": HERE, **more})
        self.greeting = self.process.stdout.readline()
        self.url = f"http://localhost:{self.port}/"

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

    CHANGES = FILES = None

    def setUp(self):
        need(ClientProtocol, "websockets", "pip install websockets")
        self.chat = self.start(changes=self.CHANGES, files=self.FILES)

    def start(self, *options, log="", **more):
        chat = Chat(*options, **more)
        self.addCleanup(lambda: self.assertIn(chat.stop(), [(0, log), None]))
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
        log = self.chat.stop()[1]
        self.assertEqual(len(log.splitlines()), len(refused), log)
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
        self.chat.stop(signal.SIGKILL)  # it would wait for the flooder's answer to its goodbye

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
            for _ in range(10):
                crowd = [self.guest() for _ in range(40)]
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
        come_and_go()
        self.assertLess(self.chat.memory() - memory, 10)
        self.assertLessEqual(self.chat.files(), files + 5)


class TheSlowAreHeldUpAndTheDeafAreCutOff(ChatTest):
    CHANGES = """
server.PAUSE = 0
server.LENGTHS["message"] = 60_000
server.application.settings.update(websocket_max_message_size=70_000, websocket_ping_interval=0.5)"""

    def test_one_that_does_not_read_is_cut_off_and_one_that_reads_slowly_is_not(self):
        deaf, slow, ann = self.guest("Deaf", slow=True), self.guest(slow=True), self.guest("Ann")
        memory, lines = self.chat.memory("VmHWM"), []
        while "Deaf left" not in lines and len(lines) < 500:
            ann.say("x" * 60_000)
            lines.append(ann.line()["message"])
            if len(lines) < 60:
                slow.line()
        self.assertIn("Deaf left", lines)
        self.assertGreater(len(lines), 4 * 1024 * 1024 // 60_000)  # 4 MiB may wait for it
        self.assertLess(self.chat.memory("VmHWM") - memory, 40)
        deaf.vanish()

    def test_under_pressure_nobody_is_closed_who_answers_pings(self):
        ann, deaf = self.guest("Ann"), self.guest("Deaf", slow=True)
        ann.until("Deaf joined")
        end, rounds, crowd = time.monotonic() + 2, 0, collections.deque()
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

    def test_one_that_answers_no_ping_is_closed(self):
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

    def test_a_request_that_never_ends_does_not_stay_open_and_a_body_is_refused(self):
        for request in b"", b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\nx":
            with socket.create_connection(("127.0.0.1", self.chat.port), WAIT) as stranger:
                stranger.sendall(request)
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
        for options, word in [(["--port", "x"], "'x'"), (["--port", "99999"], "--port"), (["--port=-1"], "--port"),
                              (["--port=0"], "--port"), (["--prot", "1"], "--prot"), (["--address", "no.invalid"], "no.invalid"),
                              (["--address", ".."], ".."), ([f"--port={self.chat.port}"], f"{self.chat.port}")]:
            with self.subTest(options):
                done = self.run_server(*options)
                self.assertGreater(done.returncode, 0)
                self.assertIn(word, done.stderr.splitlines()[-1])
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
            chat = self.start(changes="server.HEARTBEAT = 0.01; server.MAX_UNREAD = 10_000")
            anns = [self.guest(f"Ann {i}", chat) for i in range(20)]
            for _ in range(3 if deaf else 0):  # they flood, and read nothing
                flood = frame(json.dumps(new_message("flood"))) * 20000
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
        for _ in range(5):
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
        self.chat.stop(signal.SIGKILL)
        self.chat = Chat(changes=f"def broken(*args, **kwargs):\n    raise TypeError('a mistake')\n{changes}")
        self.addCleanup(self.chat.stop, signal.SIGKILL)

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
