"""What ScopyChat promises, seen from outside: over sockets, over HTTP, in a browser, in the server's log.

    python -m unittest                                                        all tests
    python -m unittest -v test_server.TheChat.test_everybody_hears_a_message  one of them

A test has a server process of its own, self.chat; guests, who talk to it over real sockets; and windows of a real
browser.  To add one, start with this, in the class for the part of the script or the page that makes the promise:

    def test_bob_hears_ann(self):
        ann, bob = self.guest("Ann"), self.guest("Bob")
        ann.say("hi")
        self.assertEqual(bob.until("hi")[-1]["nick"], "Ann")

A guest reads only when it is told to: one list, one line, or all lines until a message.  What is waited for must come
within WAIT seconds; otherwise the test fails, and says what did not come.  A limit that takes too long to reach is made
small by `changes`, Python code that runs before the server.  With `clock`, the server's clock stands still, and
chat.later(20) moves it on, so that a test sees the real limits and never waits for them.  At the end, each server must
stop with status 0 and an empty log.  What a test lacks, it names, and is skipped; with CI=true it fails instead.
"""
import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest

with contextlib.suppress(ImportError):
    from websockets.client import ClientProtocol
    from websockets.uri import parse_uri
with contextlib.suppress(ImportError):
    from playwright.sync_api import expect, sync_playwright

HERE = pathlib.Path(__file__).resolve().parent
SCRIPT = HERE / "server.py"
WAIT = 10  # seconds
JQUERY = HERE / ".ci/node_modules/jquery/dist/jquery.min.js"
AXE = HERE / ".ci/node_modules/axe-core/axe.min.js"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
HANDLERS = "WSHandler", "CrowdWSHandler", "ReliableWSHandler", "PublicWSHandler", "FastWSHandler"
NO_PAUSE = "server.PublicWSHandler.pause = 0"
GET = "GET / HTTP/1.0\r\n\r\n"
HANDSHAKE = ("GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
             "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
CLOCK = """
import selectors, time
real, select = time.monotonic, selectors.DefaultSelector.select
def monotonic():
    with open({path!r}) as file:
        return float(file.read() or real())
time.monotonic = monotonic
selectors.DefaultSelector.select = lambda self, timeout=None: select(self, min(0.01, 1 if timeout is None else timeout))
"""


def need(there, what, how):  # skip a test that lacks something, and say how to get it; with CI=true, fail
    if not there:
        if os.environ.get("CI") == "true":
            raise AssertionError(f"{what} is absent, and with CI=true nothing may be skipped")
        raise unittest.SkipTest(f"{what} is absent. To run this test: {how}")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as there:
        return there.getsockname()[1]


def new_message(message, nick="Ann", **more):
    return {"type": "new_message", "nick": nick, "message": message, **more}


def frame(data, first=0x81):  # a client's frame (RFC 6455, 5.2), also a forbidden one; a mask of zeros changes nothing
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    size = bytes([0x80 | len(data)]) if len(data) < 126 else struct.pack("!BH", 0xfe, len(data))
    return bytes([first]) + size + bytes(4) + data


class Chat:
    """A server process on a free port; with `script`, one that runs this script, with the keywords in `more`.

    Without, it is one that has been started ahead, as what it imports takes most of its time.
    """

    AHEAD = ("import asyncio, json, server, sys\n"
             "sys.argv[1:], changes = json.loads(input()); exec(changes); asyncio.run(server.main())")
    ahead = None

    def __init__(self, *options, changes="", clock=None, script=None, port=None, **more):
        self.port, self.clock = port or free_port(), clock
        options = [f"--port={self.port}", *options]
        if clock:
            clock.write_text("1000")
            changes = CLOCK.format(path=str(clock)) + changes
        more = {"cwd": HERE, "env": os.environ, **more}
        more["env"] = {**more["env"], "PYTHONUNBUFFERED": ""}  # The greeting must come by itself.
        run = functools.partial(subprocess.Popen, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, **more)
        if script:
            self.process = run([sys.executable, script, *options])
        else:
            self.process = Chat.ahead or run([sys.executable, "-c", Chat.AHEAD])
            self.process.stdin.write(json.dumps([options, changes]) + "\n")
            Chat.ahead = run([sys.executable, "-c", Chat.AHEAD])
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], WAIT)[0]:
            self.process.kill()
            raise AssertionError(f"the server did not say within {WAIT} s that it is open")
        self.greeting = self.process.stdout.readline()

    def later(self, seconds):  # move the clock on, and wait until the server has done what is due
        (new := self.clock.with_suffix(".new")).write_text(f"{float(self.clock.read_text()) + seconds}")
        new.replace(self.clock)
        for _ in range(2 if self.process.poll() is None else 0):
            with contextlib.suppress(ConnectionError):
                with socket.create_connection(("127.0.0.1", self.port), WAIT) as there:
                    there.sendall(GET.encode())
                    while there.recv(65536):
                        pass

    def stop(self, signum=signal.SIGTERM):
        """Stop it, unless a signal was sent already (0); return its exit status and its log, the first time."""
        if self.process.stdout.closed:
            return None
        if self.clock:
            self.clock.write_text("")  # from now on, it runs
        self.process.send_signal(signum)
        try:
            log = self.process.communicate(timeout=WAIT)[1]
        finally:
            self.process.kill()
        return self.process.returncode, log

    @contextlib.contextmanager
    def frozen(self):  # whatever happens meanwhile arrives at the server at one moment
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def memory(self):  # how many MiB it has, and how many open files
        need(sys.platform == "linux", "/proc", "use Linux")
        proc = pathlib.Path(f"/proc/{self.process.pid}")
        return int(re.search(r"VmRSS:\s+(\d+)", (proc / "status").read_text())[1]) >> 10, len(os.listdir(proc / "fd"))


class Guest:
    """Somebody in the chat, who reads only when told to.  The package websockets knows the protocol."""

    def __init__(self, port, nick=None):
        self.socket, self.events, self.lines, self.status = socket.socket(), [], [], None
        self.socket.settimeout(WAIT)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # with these two, little can wait in TCP
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        self.socket.connect(("127.0.0.1", port))
        self.protocol = ClientProtocol(parse_uri(f"ws://localhost:{port}/chat"), max_size=None)
        self.protocol.send_request(self.protocol.connect())
        self.raw(*self.protocol.data_to_send())
        with contextlib.suppress(ConnectionError):
            self.status = self.event("the handshake", time.monotonic() + WAIT).status_code
        if nick:
            self.send({"type": "join", "nick": nick})
            self.until(f"{nick} joined")

    def raw(self, *data):  # bytes as they are: as many as TCP takes at once, and none if the server has hung up
        with contextlib.suppress(OSError):
            self.socket.send(b"".join(data))

    def send(self, data):  # an object or a text
        self.protocol.send_text((data if isinstance(data, str) else json.dumps(data)).encode())
        self.socket.sendall(b"".join(self.protocol.data_to_send()))

    def say(self, message, nick="Ann", **more):
        self.send(new_message(message, nick, **more))

    def event(self, what, end):  # the response to the handshake, then one frame after the other
        while not self.events:
            self.socket.settimeout(max(end - time.monotonic(), 0.001))
            with contextlib.suppress(TimeoutError):
                if not (data := self.socket.recv(1 << 20)):
                    raise ConnectionError("the server has hung up")
                self.protocol.receive_data(data)
                self.events += self.protocol.events_received()
                self.raw(*self.protocol.data_to_send())  # it answers pings
            if time.monotonic() > end:
                raise AssertionError(f"{what!r} did not come within {WAIT} s; these came: {self.events} {self.lines}")
        return self.events.pop(0)

    def list(self, what="a list", end=None):  # the next list of the server, with what is around it
        while (event := self.event(what, end or time.monotonic() + WAIT)).opcode != 1:
            if event.opcode == 8:
                raise ConnectionError(f"{event}")
        return json.loads(event.data)

    def line(self, what="a line", end=None):  # the next entry of the lists
        while not self.lines:
            self.lines += self.list(what, end)["data"]
        return self.lines.pop(0)

    def until(self, message):  # all lines up to the one with this message
        end = time.monotonic() + WAIT
        lines = [self.line(message, end)]
        while lines[-1]["message"] != message:
            lines.append(self.line(message, end))
        return lines

    def said(self, message):  # what people say, up to this message
        return [line["message"] for line in self.until(message) if "nick" in line]

    def ended(self):  # how the connection ended
        try:
            self.until("the end of the connection")
        except ConnectionError as error:
            return f"{error}"

    def vanish(self):  # it resets the connection, as when a machine crashes
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def tearDownModule():
    if Chat.ahead:
        Chat.ahead.kill()
        Chat.ahead.communicate()


class ChatTest(unittest.TestCase):
    """A test with servers, guests and strangers."""

    CHANGES = ""  # for self.chat

    @functools.cached_property
    def chat(self):
        return self.start(changes=self.CHANGES)

    @functools.cached_property
    def folder(self):
        return pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def start(self, *options, clock=False, **more):  # a server; its end is looked at when the tests of a class are over
        chat = Chat(*options, clock=self.folder / f"clock{time.time_ns()}" if clock else None, **more)
        self.addClassCleanup(lambda: self.assertIn(chat.stop(0), [(0, ""), None]))
        self.addCleanup(lambda: self.assertIn(chat.stop(), [(0, ""), None]) if clock else chat.process.terminate())
        return chat

    def guest(self, nick=None, chat=None):
        need("ClientProtocol" in globals(), "websockets", "pip install websockets")
        guest = Guest((chat or self.chat).port, nick)
        self.addCleanup(guest.socket.close)
        return guest

    def stranger(self, text, chat=None, host="127.0.0.1"):  # a connection, as a file, through which this text is sent
        with socket.create_connection((host, (chat or self.chat).port), WAIT) as there:
            there.sendall(text.encode())
            stranger = there.makefile("rwb", 0)
        self.addCleanup(stranger.close)
        return stranger

    def eventually(self, there, what):  # wait until there() is true
        end = time.monotonic() + WAIT
        while not there():
            self.assertLess(time.monotonic(), end, f"within {WAIT} s, it did not come about that {what}")

    def handlers(self, *handlers, **more):  # a server for each of these, one after the other
        for handler in handlers or HANDLERS:
            yield self.start("--handler", handler, **more)


class TheChat(ChatTest):
    def test_everybody_hears_a_message(self):
        ann, bob = self.guest("Ann"), self.guest("Bob")
        ann.send({"type": "new_message", "message": "hi", "id": "k3j9x"})
        said = bob.until("hi")[-1]
        self.assertEqual(ann.until("hi")[-1], said)
        self.assertAlmostEqual(said.pop("time"), time.time(), delta=60)
        self.assertEqual(said, {"type": "message", "nick": "Ann", "message": "hi", "id": "k3j9x"})

    def test_who_has_joined_keeps_that_nick(self):
        ann = self.guest("Ann")
        ann.say("hi", "Bob")
        ann.send({"type": "join", "nick": "Bob"})
        self.assertEqual([ann.line()["nick"], ann.line()["type"]], ["Ann", "error"])

    def test_a_newcomer_gets_the_last_100_messages(self):
        ann, messages = self.guest("Ann", chat := self.start(changes=NO_PAUSE)), [f"{i}" for i in range(150)]
        for message in messages:
            ann.say(message)
        ann.until("149")
        history = self.guest(chat=chat).list()
        self.assertEqual(([said["message"] for said in history["data"]], history["online"]), (messages[-100:], 2))

    def test_a_message_needs_no_more_bytes_than_utf8(self):
        (ann := self.guest("Ann")).say("привет, 世界")
        self.assertIn("привет, 世界".encode(), ann.event("привет", time.monotonic() + WAIT).data)

    def test_joining_and_leaving_is_told_and_not_kept(self):
        ann = self.guest("Ann")
        self.guest("Bob").vanish()
        for message, online in ("Bob joined", 2), ("Bob left", 1):
            news = {"type": "list", "data": [{"type": "notice", "message": message}], "online": online}
            self.assertEqual(ann.list(), news)
        self.assertEqual(self.guest().list()["data"], [])

    def test_who_never_joined_leaves_without_a_word(self):
        ann = self.guest("Ann")
        self.guest().vanish()
        self.eventually(lambda: ann.say("hi") or ann.list()["online"] == 1, "one is online")
        ann.say("the end")
        self.assertEqual({line["type"] for line in ann.until("the end")}, {"message"})

    def test_each_part_is_a_chat_and_heeds_an_edit_of_on_message(self):
        for chat in self.handlers(changes="""before = server.WSHandler.on_message
server.WSHandler.on_message = lambda self, data: before(self, data.replace("hi", "ho"))"""):
            ann, bob = self.guest("Ann", chat), self.guest("Bob", chat)
            bob.say("hi", "Bob")
            self.assertEqual([line["message"] for line in ann.until("ho")], ["Bob joined", "ho"])
            self.assertEqual(self.guest(chat=chat).said("ho"), ["ho"])
            bob.vanish()
            ann.until("Bob left")

    def test_who_is_gone_before_the_history_is_sent_is_offline(self):
        for chat in self.handlers():
            ann = self.guest("Ann", chat)
            with chat.frozen():
                for _ in range(20):
                    self.stranger(HANDSHAKE, chat).close()
            self.eventually(lambda: ann.say("hi") or ann.list()["online"] == 1, "one is online")
            ann.socket.close()
            chat.stop()  # the first two handlers log that these were gone

    def test_a_readers_mistake_shows_a_traceback(self):
        for name in "WSHandler.open WSHandler.on_message WSHandler.on_close send_to_all MainHandler.get".split():
            chat = self.start(changes=f"server.{name} = lambda *args: args == ([],) or 1 / 0")
            (guest := self.guest(chat=chat)).raw(frame(new_message("hi")), frame(b"", 0x88))
            guest.ended()
            self.stranger(GET, chat).read()
            self.assertRegex(chat.stop(signal.SIGKILL)[1], "(?s)Traceback.*ZeroDivisionError", name)


class ACrowd(ChatTest):
    def test_what_is_said_at_once_arrives_as_few_lists(self):
        guests, lists, said = [self.guest() for _ in range(30)], 0, []
        with self.chat.frozen():
            for i in range(60):
                guests[i % 30].say(f"{i}")
        while len(said) < 60:
            said += [line["message"] for line in guests[0].list()["data"]]
            lists += 1
        self.assertLess(lists, 20)
        for guest in guests[1:]:  # all hear all, in one order, and each sender's in the order of that sender
            self.assertEqual([guest.line()["message"] for _ in said], said)
        self.assertEqual(sorted(said, key=lambda i: int(i) % 30), [f"{i + j}" for i in range(30) for j in (0, 30)])

    def test_who_comes_in_meanwhile_hears_each_message_once(self):
        guests = [self.guest() for _ in range(20)]
        with concurrent.futures.ThreadPoolExecutor(20) as pool, self.chat.frozen():
            newcomers = [pool.submit(self.guest) for _ in range(20)]
            for i, guest in enumerate(guests):
                guest.say(f"{i}")
        guests[0].say("the end")
        for newcomer in newcomers:
            self.assertEqual({*(said := newcomer.result().said("the end"))}, {*map(str, range(20)), "the end"})
            self.assertEqual(len(said), 21)

    def test_after_a_readers_mistake_the_next_message_is_heard(self):
        chat = self.start(changes="""before = server.send_to_all
server.send_to_all = lambda entries: before(1 / ("oh" not in str(entries)) and entries)""")
        ann = self.guest("Ann", chat)
        for message in "oh", "once more":
            ann.say(message)
        ann.until("once more")
        self.assertIn("Traceback", chat.stop(signal.SIGKILL)[1])


class ANetworkThatFails(ChatTest):
    def test_a_repetition_is_answered_to_its_sender_alone(self):
        ann, bob = self.guest("Ann"), self.guest("Bob")
        ann.say("once", id="k3j9x")
        once = ann.until("once")[-1]
        ann.say("twice", id="k3j9x")
        self.assertEqual(ann.line(), once)
        ann.say("the end")
        self.assertEqual(bob.said("the end"), ["once", "the end"])

    def test_the_server_knows_the_last_10000_messages(self):
        (ann := self.guest(chat=self.start(changes=NO_PAUSE))).say("first", id="first")
        first = ann.line()
        for i in range(11):
            ann.socket.sendall(b"".join(frame(new_message("m", id=f"{i}-{j}")) for j in range(909)))  # 9999
            for _ in range(909):
                ann.line()
        ann.say("again", id="first")
        self.assertEqual(ann.line(), first)
        ann.say("one more")
        ann.say("forgotten", id="first")
        self.assertEqual(ann.said("forgotten"), ["one more", "forgotten"])

    def test_a_message_without_an_id_is_given_one(self):
        ann = self.guest("Ann")
        for _ in range(2):
            ann.say("hi")
        self.assertEqual(len({ann.line()["id"], ann.line()["id"], None}), 3)

    def test_who_is_back_already_neither_joins_nor_leaves(self):
        ann, old, new = self.guest("Ann"), self.guest("Bob"), self.guest()
        new.send({"type": "join", "nick": "Bob"})
        new.say("I am back")
        new.until("I am back")
        old.vanish()
        self.eventually(lambda: ann.say("hi") or ann.list()["online"] == 2, "two are online")
        new.vanish()
        self.assertEqual([line["message"] for line in ann.until("Bob left") if "nick" not in line], ["Bob left"])

    def test_a_heartbeat_comes_every_10_seconds(self):
        for clock in "", "server.time.time = lambda: 1e9 - 3600 * server.time.monotonic()":  # set back all the time
            chat = self.start(changes=clock, clock=True)
            ann, bob = self.guest("Ann", chat), self.guest(chat=chat)
            bob.list()
            for i in range(3):
                chat.later(9.9)
                ann.say(f"{i}")
                self.assertEqual(len(bob.list()["data"]), 1)
                chat.later(0.1)
                self.assertEqual(bob.list(), {"type": "list", "data": [], "online": 2})

    def test_who_answers_no_ping_for_20_seconds_is_disconnected(self):
        chat = self.start(clock=True)
        ann, silent = self.guest("Ann", chat), self.guest(chat=chat)
        silent.raw = lambda *data: None
        chat.later(0)  # by now, the server's 20 seconds have begun
        for seconds in 20, 19.9:  # the first ping, and not quite the second
            chat.later(seconds)
            ann.say(f"{seconds}")
            silent.until(f"{seconds}")
        chat.later(0.2)
        self.assertIn("ping timed out", silent.ended())

    def test_many_who_vanish_leave_nothing_behind(self):
        ann, memory = self.guest("Ann", chat := self.start(changes=NO_PAUSE)), []
        for i in range(4):
            ghosts = [self.guest(f"Ghost {i}", chat)] + [self.guest(chat=chat) for _ in range(19)]
            for ghost in ghosts:
                ghost.say("😀" * 1000)
            ann.raw(*[frame(new_message("😀" * 1000))] * 5)
            for ghost in ghosts:
                ghost.vanish()
            ann.until(f"Ghost {i} left")
            memory.append(chat.memory())
        self.assertLess(memory[3][0] - memory[1][0], 10)
        self.eventually(lambda: chat.memory()[1] < 30, "their files are closed")

    def test_who_vanishes_leaves_no_line_in_the_log(self):
        for chat in self.handlers(*HANDLERS[2:]):
            ann, ghosts = self.guest("Ann", chat), [self.guest("Ghost", chat), *(self.guest(chat=chat) for _ in "1234")]
            with chat.frozen():
                for i in range(30):
                    ann.raw(frame(new_message("x" * 1000)))
                for ghost in ghosts:
                    ghost.vanish()
            ann.until("Ghost left")


# What a client may send by mistake or on purpose, and what the answer must match.
BAD = [
    *((bad, "JSON object") for bad in (
        "hello", "", "{", '"text"', "[]", "3", "null", "[" * 8000, '{"a":' * 1300, "9" * 8000, frame(b"\x00\xff", 0x82),
        {}, {"type": "list"}, {"type": None}, {"type": ["join"]})),
    *(({**sent, "nick": nick}, "nick must") for sent in ({"type": "join"}, new_message("hi")) for nick in (
        None, 3, ["Ann"], "", " \t", "\u200b\xad\ufeff", "\ufe0f", "\n")),
    *(({"type": kind}, "must be") for kind in ("join", "new_message")),
    *((new_message(message), "message must") for message in (
        None, 7, ["hi"], {"a": 1}, "", " \n ", "\u200b", "\u2060", "\xad", "\ufeff", "\x00")),
    *((new_message("hi", id=id), "id must") for id in (None, 7, "", " ", [], {})),
    *((new_message("hi", **{name: "x"}), "no other fields") for name in ("time", "online", "\ud800")),
    ({"type": "join", "nick": "n" * 31}, "nick has 31 .* 30"), (new_message("hi", id="i" * 65), "id has 65 .* 64"),
    (new_message("m" * 1240), "1,240 .* 1,000"), (new_message("m" * 1001, id="k3j9x"), "1,001"),
    (new_message(" " * 30000), "30,000"),
]
ODD = ["ශ්\u200dරී", "علی\u200cرضا", "🏳️\u200d🌈", "a\x00", "\u2028b", "\u202eabc", "\U0001faff", " e\u0301 ",
       "Q" + "\u0316" * 29]


class Strangers(ChatTest):
    CHANGES = NO_PAUSE

    def test_bad_input_is_answered_in_words_to_its_sender_alone(self):
        ann, bob = self.guest("Ann"), self.guest()
        for bad, words in BAD:
            with self.subTest(str(bad)[:60]):
                (bob.raw if isinstance(bad, bytes) else bob.send)(bad)
                error = bob.line()
                self.assertRegex(error.pop("message"), words)
                id = bad.get("id") if isinstance(bad, dict) else None
                self.assertEqual(error, {"type": "error", "id": id if isinstance(id, str) and len(id) < 65 else None})
        bob.say("still here")
        self.assertEqual(ann.line()["message"], "still here")

    def test_what_is_allowed_is_relayed_as_it_is(self):
        ann, bob = self.guest(), self.guest()
        for nick, message in ("😀" * 30, "😀" * 1000), *((odd, odd + "</script>\n") for odd in ODD):
            for ascii in True, False:
                sent = new_message(message, nick, id=f"{ascii}{nick}".ljust(64, "😀"))
                ann.send(json.dumps(sent, ensure_ascii=ascii))
                for said in ann.line(), bob.line():
                    self.assertGreater(said.pop("time"), 1e9)
                    self.assertEqual(said, {**sent, "type": "message"})

    def test_half_an_emoji_harms_nobody(self):
        for chat in self.handlers(HANDLERS[0], HANDLERS[4]):
            ann, bob = self.guest("Ann", chat), self.guest(chat=chat)
            bob.send(new_message("a\ud800", "\udfffb", id="\ud83d"))
            self.assertRegex(ann.line()["message"], "^a.$")
            ann.say("", id="\ud83d")  # an error, but not in the first parts
            bob.say("the end")
            self.assertEqual(ann.until("the end")[-1]["nick"], "Ann")
            self.assertEqual(self.guest(chat=chat).list()["data"][0]["message"][0], "a")

    def test_who_breaks_the_protocol_is_disconnected_alone(self):
        (ann := self.guest("Ann")).say("still here")
        for abuse in (b"\x16\x03\x01\x02\x00" * 50, frame({}, 0xc1), frame(b"\xff\xfe"), frame(b"x" * 32769),
                      struct.pack("!BBQ", 0x81, 0xff, 1 << 62), frame(b"x", 0x01) + frame(b"x" * 200, 0x00) * 170):
            (guest := self.guest()).raw(abuse)
            self.assertTrue(guest.ended(), abuse[:9])
        ann.until("still here")

    def test_one_client_is_heard_50_times_a_second(self):
        chat = self.start(clock=True)
        ann, bob, flooder = (self.guest(chat=chat) for _ in range(3))
        flooder.raw(*(frame(new_message(f"{i}")) for i in range(9)))
        bob.until("0")
        for i in range(1, 4):
            chat.later(0.019)
            ann.say(f"before {i}")
            ann.until(f"before {i}")
            chat.later(0.002)
        self.guest(chat=chat).say("the end")
        self.assertEqual(bob.said("the end")[:-1], ["before 1", "1", "before 2", "2", "before 3", "3"])

    def test_a_flood_does_not_delay_the_others(self):
        ann, flooder = self.guest("Ann", chat := self.start()), self.guest("Flooder", chat)
        flooder.raw(*(frame(new_message(f"{i}")) for i in range(2000)))
        flooded = ann.said("4")
        for i in range(10):
            ann.say(f"line {i}")
            flooded += ann.said(f"line {i}")[:-1]
        self.assertEqual(flooded, [f"{i}" for i in range(min(len(flooded), 1000))])
        chat.stop(signal.SIGKILL)  # it would wait for the flooder's answer to its goodbye

    def test_a_flooder_who_vanishes_is_soon_offline(self):
        ann, flooder = self.guest("Ann", chat := self.start()), self.guest("Flooder", chat)
        flooder.raw(*[frame(b"")] * 9000)
        flooder.line()
        flooder.vanish()
        ann.until("Flooder left")

    def test_http_statuses_and_a_log_of_what_is_refused(self):
        statuses = {"GET /": 200, "GET /?nick=Ann": 200, "GET /chat": 400, "GET /nowhere": 404, "GET /server.py": 404}
        statuses |= {f"{method} /{path}": 405 for method in ("POST", "PUT", "DELETE") for path in ("", "chat")}
        requests = [(f"{request} HTTP/1.0\r\n\r\n", status) for request, status in statuses.items()]
        requests += [(f"{HANDSHAKE[:-2]}Origin: http://{a}\r\n\r\n", s) for a, s in (("a", 101), ("b", 403))]
        for request, status in [*requests, ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx", 400)]:
            with self.stranger(request) as answer:  # the last one comes before the body has
                self.assertIn(f" {status} ", answer.readline().decode(), request)
        log = [" ".join(line.split()[:3]) for line in self.chat.stop()[1].splitlines()]
        self.assertEqual(log, [f"{status} {sent.split(' HTTP')[0]}" for sent, status in requests if status > 399])


class Speed(ChatTest):
    LONG = NO_PAUSE + """; server.LENGTHS.update(message=60_000, nick=70_000)
server.SETTINGS["websocket_max_message_size"] = 80_000"""

    def test_lists_of_the_lengths_where_a_header_changes(self):
        chat = self.start(changes=self.LONG)
        rest = len(json.dumps({"type": "list", "data": [{"type": "notice", "message": " joined"}], "online": 1}))
        for length in 125, 126, 65535, 65536:
            self.guest("n" * (length - rest), chat).vanish()

    def deaf(self):  # a chat whose clock stands still, Ann, and somebody who has not read 7 MB
        chat = self.start(changes=self.LONG, clock=True)
        ann, deaf = self.guest("Ann", chat), self.guest("Deaf", chat)
        for i in range(120):
            ann.say("x" * 60_000)
            ann.line()
        return chat, ann, deaf

    def test_who_reads_nothing_for_20_seconds_is_disconnected(self):
        chat, ann, deaf = self.deaf()
        chat.later(19.9)
        for message in "not yet", "still not":
            ann.say(message)
            self.assertNotIn("Deaf left", [line["message"] for line in ann.until(message)])
        chat.later(0.2)
        ann.say("now")
        ann.until("Deaf left")

    def test_who_reads_nothing_is_heard_once_a_second(self):
        chat, ann, deaf = self.deaf()
        deaf.raw(*(frame(new_message(f"{i}")) for i in range(3)))
        for i in range(3):
            ann.until(f"{i}")
            chat.later(0.9)
            ann.say("not yet")
            self.assertEqual(len(ann.until("not yet")), 1)
            chat.later(0.2)

    def test_who_reads_slowly_gets_every_message(self):
        ann, slow = self.guest("Ann", chat := self.start(changes=self.LONG, clock=True)), self.guest(chat=chat)
        for _ in range(2):
            for i in range(100):
                ann.say("x" * 60_000)
                ann.say(f"{i}")
                ann.until(f"{i}")
            self.assertEqual([m for m in slow.said("99") if m[0] != "x"], [f"{i}" for i in range(100)])
            chat.later(21)  # It was behind for a moment only.

    def test_what_many_do_not_read_is_in_memory_once(self):
        ann = self.guest("Ann", chat := self.start(changes=self.LONG))
        crowd, before = [self.guest(chat=chat) for _ in range(60)], chat.memory()[0]
        with chat.frozen():
            for guest in crowd:
                guest.say("x" * 60_000)
        for _ in crowd:
            ann.line()
        self.assertLess(chat.memory()[0] - before, 35)  # MiB; 60 times what waits would be more
        chat.stop(signal.SIGKILL)


class HowItStarts(ChatTest):
    def test_it_serves_this_machine_alone_unless_told_otherwise(self):
        need(sys.platform == "linux", "127.0.0.2, another address of this machine", "use Linux")
        for options, at, host in (([], "localhost", "localhost"), (["--address="], "localhost", "localhost"),
                                  (["--address=::1"], "[::1]", "::1"), (["--address=0.0.0.0"], "0.0.0.0", "127.0.0.2")):
            chat = self.start(*options, script=SCRIPT, cwd="/")
            self.assertIn(f" http://{at}:{chat.port}/ ", chat.greeting)
            self.assertIn(b"Welcome to ScopyChat", self.stranger(GET, chat, host).read())
            if host != "127.0.0.2":
                self.assertRaises(ConnectionRefusedError, self.stranger, GET, chat, "127.0.0.2")

    def test_wrong_options_get_one_clear_line(self):
        wrong = {"--port=x": "port", "--port=99999": "port", "--port=-1": "port", "--port=0": "port",
                 f"--port={self.chat.port}": "port", "--prot=1": "--prot", "--address=no.invalid": "no.invalid",
                 "--address=..": "listen", "--handler=Chat": ".*".join(HANDLERS)}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for words, (status, log) in zip(wrong.values(), pool.map(lambda o: Chat(o, script=SCRIPT).stop(0), wrong)):
                self.assertRegex(f"{status} {log}", rf"\A[12] (usage: .*\n( .*\n)*)?.*{words}.*\n\Z")

    def test_the_port_is_8888_unless_told_otherwise(self):
        asked = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True)
        self.assertRegex(asked.stdout, r"--port PORT +default: 8888\n")

    def test_each_visitor_gets_a_guest_name_of_its_own(self):
        names = [re.search(rb'value="(User\d+)"', self.stranger(GET).read())[1] for _ in range(102)]
        self.assertEqual(len({*names}), 102)

    def test_when_files_run_out_newcomers_are_hung_up_on(self):
        chat = self.start(changes="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))")
        room = [self.guest("Ann", chat)]
        while room[-1].status:
            room.append(self.guest(chat=chat))
        self.assertIn(len(room), range(30, 60))
        self.assertEqual({self.guest(chat=chat).status for _ in range(100)}, {None})
        room[0].say("we talk on")
        room[1].until("we talk on")
        room[2].vanish()
        self.eventually(lambda: self.guest(chat=chat).status, "there is room again")

    def test_where_no_limit_on_files_is_known_it_serves_all(self):
        for unknown in "del server.os.sysconf", "server.os.sysconf = lambda name: -1":  # the first is Windows
            self.assertEqual(self.guest(chat=self.start(changes=unknown)).status, 101)

    def test_a_request_must_end_within_20_seconds(self):
        chat = self.start(clock=True)
        for request in "", HANDSHAKE[:-2], "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n":
            stranger = self.stranger(request, chat)
            chat.later(0)  # by now, the server has read the request
            chat.later(19.9)
            self.assertFalse(select.select([stranger], [], [], 0)[0])
            chat.later(0.2)
            stranger.read()

    def test_a_signal_ends_it_with_a_goodbye_to_all(self):
        for signum in signal.SIGINT, signal.SIGTERM:
            ann = self.guest("Ann", chat := self.start(script=SCRIPT))
            chat.process.send_signal(signum)
            self.assertRegex(ann.ended(), "1001 .*the server stops")
            self.assertEqual(chat.stop(0), (0, ""))

    def test_a_second_signal_changes_nothing(self):
        self.guest("Ann").socket.close()
        self.chat.process.send_signal(signal.SIGINT)
        self.assertEqual(self.chat.stop(), (0, ""))

    def test_a_signal_right_after_the_greeting_is_heeded(self):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            ended = pool.map(lambda signum: Chat(script=SCRIPT).stop(signum), [signal.SIGINT, signal.SIGTERM] * 2)
            self.assertEqual([*ended], [(0, "")] * 4)

    def test_what_has_just_arrived_is_sent_before_the_goodbye(self):
        ann, bob = self.guest("Ann"), self.guest("Bob")
        with self.chat.frozen():
            ann.say("the end")
            self.chat.process.send_signal(signal.SIGTERM)
        bob.until("the end")

    def test_who_does_not_answer_its_goodbye_does_not_hold_it_up(self):
        chat = self.start(clock=True)
        silent, newcomer = self.stranger(HANDSHAKE, chat), self.stranger(HANDSHAKE[:-2], chat)
        chat.later(0)  # by now, the server has read both
        chat.process.send_signal(signal.SIGTERM)
        for i in range(50):  # within 2.5 seconds, of which the goodbye takes 2.1
            chat.later(0.05)
            with contextlib.suppress(subprocess.TimeoutExpired):
                chat.process.wait(0.02)
            if i == 10:
                newcomer.write(HANDSHAKE[-2:].encode())  # it comes in when the others have got their goodbye
        for stranger in silent, newcomer:
            self.assertIn(b"\x03\xe9the server stops", stranger.read())
        self.assertEqual(chat.process.wait(WAIT), 0)

    def test_fifty_who_flood_do_not_hold_it_up(self):
        ann = self.guest("Ann", chat := self.start(clock=True))
        for _ in range(50):
            self.guest(chat=chat).raw((frame(new_message("flood")) + frame(b"bad")) * 1000)
        chat.process.send_signal(signal.SIGTERM)
        self.eventually(lambda: chat.later(0.05) or chat.process.poll() is not None, "the server ends")
        self.assertIn("1001", ann.ended())
        self.assertEqual(chat.stop(0), (0, ""))


# ---- The page: windows of a real browser ---------------------------------------------------------------------------

@functools.cache
def browser():  # one for all tests
    need("sync_playwright" in globals(), "Playwright", "pip install playwright")
    need(CHROMIUM, "Chromium", "install your system's package, on Debian `apt-get install chromium`")
    need(JQUERY.exists(), "jQuery", "npm install --prefix .ci jquery@4.0.0")
    playwright = unittest.enterModuleContext(sync_playwright())
    expect.set_options(timeout=WAIT * 1000)
    return unittest.enterModuleContext(playwright.chromium.launch(
        executable_path=CHROMIUM, args=["--no-sandbox", "--disable-features=LocalNetworkAccessChecks"]))


def answer(route, body, kind="text/javascript"):
    route.fulfill(body=body, content_type=kind, headers={"Access-Control-Allow-Origin": "*"})


NETWORK = r"(?s:// ==== A network that fails.*?(?=\}\);\s*</script>))"  # the parts that can be cut out
COMFORT = r"(?s:<!-- Comfort.*(?=</body>))"


class PageTest(ChatTest):
    """A test with windows of a browser.  A window's clock runs on by page.clock; window.ws is its socket."""

    CHANGES = NO_PAUSE

    def window(self, nick=None, url=None, size=(1000, 600), clock=None, cut=None, jquery=None, **options):
        """Return a page, in which this nick has joined.  What matches `cut` is cut out of it."""
        errors = []  # of the page's script
        self.addCleanup(lambda: jquery or self.assertEqual(errors, []))
        context = browser().new_context(viewport={"width": size[0], "height": size[1]}, **options)
        self.addCleanup(context.close)
        context.set_default_timeout(WAIT * 1000)
        context.route("https://code.jquery.com/**", jquery or (lambda route: answer(route, JQUERY.read_bytes())))
        page = context.new_page()
        page.sockets = []
        page.on("websocket", lambda socket: page.sockets.append(socket))
        page.on("pageerror", lambda error: errors.append(error))
        page.clock.install(time=clock)
        if cut:
            page.route("**/", lambda route: answer(route, re.sub(cut, "", route.fetch().text()), "text/html"))
        page.goto(url or f"http://localhost:{self.chat.port}/", wait_until="commit" if jquery else "load")
        if nick:
            self.join(page, nick)
        return page

    def post(self, page, *messages, label="Post as"):
        for message in messages:
            page.get_by_label(label).fill(message)
            page.get_by_label(label).press("Enter")

    def join(self, page, nick):
        self.post(page, nick, label="Nick")
        self.shows(page, f"{nick.strip()} joined")

    def shows(self, page, text):  # the last line in the log with this text, when it has come
        line = page.locator("#chat li", has_text=text).last
        line.wait_for(state="attached")
        return line

    def says(self, page, messages):  # wait until the log has exactly these messages
        expect(page.locator("#chat .message p")).to_have_text(messages)

    @contextlib.contextmanager
    def offline(self, page, chance=1):  # its connection breaks, and it gets no new one, however long it waits
        page.evaluate("""chance => new Promise(closed => {
            Math.random = () => chance; ws.addEventListener('close', closed); ws.close(); })""", chance)
        page.context.set_offline(True)
        try:
            yield
        finally:
            page.context.set_offline(False)

    def runs(self, page, until=None, seconds=60):  # let its clock run until it is online, or until this
        while not (until() if until else "online" in page.locator("#status").text_content()):
            self.assertGreater(seconds := seconds - 3, 0, page.locator("main").inner_text())
            page.clock.run_for(3000)
            page.wait_for_timeout(20)  # what was sent meanwhile arrives


class ThePage(PageTest):  # its part "The chat"
    def test_two_windows_talk_and_markup_is_text(self):
        ann, bob, markup = self.window("  Ann "), self.window("<img src=x>"), "<img src=x onerror=alert(1)><b>bold</b>"
        self.assertEqual(ann.get_by_text("Post as").text_content(), "Post as Ann")
        expect(ann.get_by_label("Nick")).to_be_hidden()
        self.post(ann, "hello", "   ", "", markup)
        self.post(bob, "hi Ann")
        for page in ann, bob:
            self.says(page, ["hello", markup, "hi Ann"])
            expect(page.locator("img, #chat p b")).to_have_count(0)
            expect(page.get_by_text("2 online")).to_be_visible()
        self.assertIn("TrustedHTML", ann.evaluate(  # a second wall
            "() => { try { jQuery('#chat').append('<li>markup</li>'); } catch (error) { return `${error}`; } }"))
        with self.offline(ann):
            self.post(ann, markup)
            expect(ann.locator("#sending p")).to_have_text(markup)
            expect(ann.locator("img, #sending b")).to_have_count(0)
        self.runs(ann)
        bob.close()
        self.shows(ann, "<img src=x> left")

    def test_a_nick_is_suggested_and_keys_suffice(self):
        page = self.window()
        self.assertRegex(page.get_by_label("Nick").input_value(), r"^User\d+$")
        page.keyboard.type("\u200b\n")  # typed over the suggestion; nobody can see it
        expect(page.get_by_label("Nick")).to_be_visible()
        page.get_by_label("Nick").fill("")
        page.keyboard.type("n" * 31 + "\nhi\n")
        self.shows(page, "n" * 30 + " joined")
        page.get_by_label("Post as").fill("by a click")
        page.get_by_role("button", name="Post").click()
        page.keyboard.type("the caret is there\n")
        self.says(page, ["hi", "by a click", "the caret is there"])
        page.keyboard.press("Shift+Tab")
        expect(page.get_by_role("region", name="Conversation")).to_be_focused()  # the arrow keys scroll it

    def test_nicks_stay_as_they_were_typed(self):
        for nick in "ශ්\u200dරී", "علی\u200cرضا 🏳️\u200d🌈 ❤️":
            page = self.window(nick)
            page.reload()
            expect(page.get_by_label("Nick")).to_have_value(nick)
            self.join(page, nick)
            self.post(page, message := f"{nick} says hi")
            self.shows(page, message)
            self.assertEqual([page.locator("b").last.text_content(), page.get_by_text("Post as").text_content()],
                             [nick, "Post as " + nick])

    def test_the_chat_alone_is_a_chat(self):
        ann, bob = (self.window(nick, cut=f"{NETWORK}|{COMFORT}") for nick in ("Ann", "Bob"))
        self.post(ann, "hello")
        expect(bob.locator("#chat .message")).to_have_text(["Ann hello"])
        self.post(bob, "hi Ann")
        self.says(ann, ["hello", "hi Ann"])
        self.chat.stop()
        for page in ann, bob:
            expect(page.get_by_text("chat server disconnected: 1001 the server stops")).to_be_visible()
            expect(page.get_by_label("Post as")).to_be_hidden()
        self.chat = self.start(port=self.chat.port)
        ann.get_by_role("button", name="Join").click()
        self.shows(ann, "Ann joined")
        self.post(ann, "I am back")
        self.says(ann, ["I am back"])
        ann.evaluate("Object.defineProperty(ws, 'readyState', {value: WebSocket.CLOSING})")
        self.post(ann, "are you there?")
        self.shows(ann, "You are not connected.")
        expect(ann.get_by_label("Post as")).to_have_value("are you there?")

    def test_the_posts_own_page_chats_with_every_handler(self):
        post = (HERE / ".ci/post.html").read_text().replace("http://code", "https://code")  # as it was printed in 2012
        page = self.window(bypass_csp=True)
        for chat in self.handlers():
            here = post.replace("localhost:8888", f"localhost:{chat.port}")
            page.route("**/2012", lambda route: answer(route, here, "text/html"))
            page.goto(f"http://localhost:{chat.port}/2012")
            page.get_by_role("button", name="Join").click()
            page.get_by_text("chat server connected").wait_for()
            bob = self.guest("Bob", chat)
            page.get_by_label("Nick").fill("Ann")
            self.post(page, "hi", label="Post as")
            self.assertEqual(bob.until("hi")[-1]["nick"], "Ann")
            bob.say("hi Ann", "Bob")
            page.get_by_text("Bob: hi Ann").wait_for()

    def test_until_jquery_has_come_nobody_can_join(self):
        browser()  # it needs jQuery, too
        held = []
        page = self.window(jquery=lambda route: held.append(route))
        for body in JQUERY.read_bytes() + b" ", b"", JQUERY.read_bytes():  # the first two are not what was published
            expect(page.get_by_text("Waiting for jQuery")).to_be_visible()
            self.eventually(lambda: held or page.wait_for_timeout(10), "the page asks for jQuery")
            expect(page.get_by_label("Nick")).to_be_hidden()
            answer(held.pop(), body)
            page.wait_for_load_state()
            if body != JQUERY.read_bytes():
                expect(page.get_by_text("Waiting for jQuery")).to_be_visible()
                page.reload(wait_until="commit")
        self.join(page, "Ann")

    def test_without_javascript_it_says_so(self):
        page = self.window(java_script_enabled=False, jquery=lambda route: route.abort())
        expect(page.locator("noscript")).to_be_visible()
        expect(page.get_by_text("jQuery")).to_be_hidden()

    def test_an_edit_shows_after_a_reload(self):
        for name in "server.py", "test.html":
            shutil.copy(HERE / name, self.folder)
        self.chat = self.start(script=self.folder / "server.py")
        page = self.window()
        (self.folder / "test.html").write_text((HERE / "test.html").read_text().replace("Welcome to", "Edited"))
        page.reload()
        expect(page.get_by_text("Edited ScopyChat")).to_be_visible()


class ThePageOnANetworkThatFails(PageTest):
    def test_it_sends_again_what_a_restarted_server_forgot(self):
        ann, bob = (self.window(nick) for nick in ("Ann", "Bob"))
        self.post(ann, "long ago")
        self.shows(ann, "long ago")
        ann.clock.run_for(61_000)
        self.post(ann, "before")
        self.shows(bob, "before")
        self.assertEqual(self.chat.stop(), (0, ""))
        self.shows(ann, "chat server disconnected: 1001 the server stops")
        expect(ann.locator("header")).to_contain_text("Reconnecting …")
        self.post(ann, "meanwhile", "and this")
        expect(ann.locator("#sending li")).to_have_text(["meanwhile", "and this"])
        self.chat = self.start(port=self.chat.port, changes=NO_PAUSE)
        self.runs(ann)
        self.post(ann, "and now")
        self.runs(bob)
        history = ["before", "meanwhile", "and this", "and now"]
        for page in ann, bob:
            self.says(page, ["long ago", *history])
        self.assertEqual(self.guest().said("and now"), history)

    def test_it_notices_a_dead_network_in_20_seconds(self):
        ann, bob = self.window("Ann", cut=COMFORT), self.guest("Bob")  # it works without comfort
        with self.chat.frozen():
            ann.clock.run_for(18_000)
            expect(ann.locator("#status")).to_contain_text("online")
            ann.clock.run_for(2_500)
            self.assertEqual(ann.get_by_text("chat server disconnected: no answer").count(), 1)
            self.post(ann, "can you hear me?")
            self.runs(ann, lambda: len(ann.sockets) > 2)  # an attempt that meets silence is not the last one
        self.runs(ann)
        bob.until("can you hear me?")
        for message in "yes", "go on":
            bob.say(message)
            self.shows(ann, message)
            ann.clock.run_for(12_000)  # each list starts the 20 seconds anew
        self.says(ann, ["can you hear me?", "yes", "go on"])
        expect(ann.get_by_text("chat server disconnected")).to_have_count(1)
        expect(ann.get_by_text("2 online")).to_be_visible()  # it has one connection, and not two

    def test_it_comes_back_after_a_random_pause(self):
        ann = self.window("Ann")
        ann.locator("#room").focus()
        ann.clock.pause_at(time.time() + 5)
        for chance, pause, quiet in (0, 1000, 0), (0.999, 4996, 17_000):
            ann.clock.run_for(quiet)  # after 20 s, it would give up, but its connection is lost before
            with self.offline(ann, chance):
                ann.clock.run_for(pause - 100)
                self.assertEqual(ann.evaluate("ws.readyState"), 3)  # closed: it has not tried yet
            ann.clock.run_for(200)
            expect(ann.locator("#status")).to_contain_text("online")
        sockets = len(ann.sockets)
        ann.clock.run_for(6000)
        self.assertEqual(len(ann.sockets), sockets)  # and did not try once more
        expect(ann.locator("#room")).to_be_focused()  # and has not taken the focus

    def test_what_was_said_meanwhile_is_shown_once(self):
        ann, bob = self.window("Ann"), self.guest("Bob")
        messages = [f"line {i}." for i in range(90)]
        for message in messages[:70]:
            bob.say(message)
        self.shows(ann, messages[69])
        with self.offline(ann):
            for message in messages[70:]:
                bob.say(message)
            bob.until(messages[-1])
        self.runs(ann)
        self.says(ann, messages)

    def test_nothing_is_lost_or_doubled_through_cuts_and_restarts(self):
        pages, lines = [self.window(nick) for nick in ("Ann", "Bob")], [f"line {i}." for i in range(24)]
        for page in pages:
            page.evaluate("Math.random = () => -0.24")  # it comes back soon
        for i, line in enumerate(lines):
            self.post(pages[i % 2], line)
            if i % 4 == 0:
                pages[i // 4 % 2].evaluate("ws.close()")
            if i == 16:  # it freezes, and at 18 it dies: what comes in between is lost
                self.chat.process.send_signal(signal.SIGSTOP)
            if i in (9, 18):
                self.chat.stop(signal.SIGTERM if i == 9 else signal.SIGKILL)
            if i in (13, 20):
                self.chat = self.start(port=self.chat.port, changes=NO_PAUSE)
        for page in pages:
            expect(page.locator("#chat .message")).to_have_count(len(lines))
            expect(page.locator("#sending li")).to_have_count(0)
            self.assertEqual(sorted(page.locator("#chat .message p").all_text_contents()), sorted(lines))

    def test_refused_messages_return_whole_and_in_order(self):
        ann, long = self.window("Ann"), [letter * 1240 for letter in "abc"]
        with self.offline(ann):
            self.post(ann, *long)
            ann.get_by_label("Post as").fill("a draft")
        self.runs(ann)
        expect(ann.get_by_label("Post as")).to_have_value(" ".join(["a draft", *long]))
        expect(ann.locator("#sending li")).to_have_count(0)
        expect(ann.get_by_text("The message has 1,240 characters.  At most 1,000 are").last).to_be_in_viewport()
        with self.offline(ann):
            ann.get_by_label("Post as").fill("")
        self.runs(ann)
        expect(ann.get_by_label("Post as")).to_have_value("")  # and they return once

    def test_however_much_is_refused_the_page_stays_connected(self):
        ann, long = self.window("Ann"), "\x01" * 5000  # of all characters, these need the most bytes: six
        with self.offline(ann):
            self.post(ann, *[long] * 3)
        self.runs(ann)
        ann.get_by_label("Post as").press("Enter")
        expect(ann.get_by_text("The message has")).to_have_count(4)
        expect(ann.get_by_text("disconnected")).to_have_count(1)


class ThePageIsComfortable(PageTest):
    def test_names_times_and_dates_head_what_is_said(self):
        times = [1351384200 + seconds for seconds in (0, 20, 3600, 3680, 90000)]  # from 02:30 on 28 October 2012
        self.chat = self.start(changes=f"""{NO_PAUSE}; import time, types; times = iter({times})
server.time = types.SimpleNamespace(time=lambda: next(times), monotonic=time.monotonic)""")
        bob = self.guest()
        for i, _ in enumerate(times):
            bob.say(f"{i}", "Bob")
            bob.until(f"{i}")
        page = self.window("Ann", timezone_id="Europe/Berlin", locale="en-GB", clock=times[-1] + 500_000)
        shown = page.locator("#chat b, #chat time, #chat .notice").filter(visible=True).all_text_contents()
        self.assertEqual(re.sub(", ", " ", "|".join(shown[1:-1])), "Sunday 28 October 2012|Bob|02:30|Bob|02:30|"
                         "Bob|02:31|Monday 29 October 2012|Bob|02:30")  # An hour repeats.

    def test_each_script_has_its_direction(self):
        ann = self.window()
        for label in "Nick", "Post as":
            ann.get_by_label(label).fill("مرحبا")
            expect(ann.get_by_label(label)).to_have_css("direction", "rtl")
            ann.keyboard.press("Enter")
        self.post(ann, "\u202ehttps://a.example/")
        expect(self.shows(ann, "a.example").locator("a")).to_have_attribute("dir", "ltr")
        self.guest().say("مرحبا Bob!", "Bob")
        self.assertLess(self.shows(ann, "مرحبا Bob!").locator("p").evaluate("""p => {
            const letter = new Range(); letter.setStart(p.firstChild, 0); letter.setEnd(p.firstChild, 1);
            return p.getBoundingClientRect().right - letter.getBoundingClientRect().right; }"""), 20)  # at the right

    def test_nobody_draws_over_anothers_line(self):
        page, bob = self.window("Q" + "\u0316" * 29), self.guest()
        bob.say("first", "Q" + "\u0316" * 29)
        for part in self.shows(page, "first"), self.shows(page, "first").locator("p"), page.locator("#post label"):
            expect(part).to_have_css("overflow", "clip")

    def test_lines_can_be_copied_and_translated(self):
        ann, bob = self.window("Bill"), self.guest()
        bob.say("hi", "Bob")
        self.shows(ann, "hi")
        self.post(ann, "hi Bob")
        line = self.shows(ann, "hi Bob")
        copied = ann.evaluate("getSelection().selectAllChildren(jQuery('#chat')[0]), getSelection().toString()")
        self.assertRegex(copied, r"Bob \d+:\d\d.*\s+hi\s+Bill \d+:\d\d.*\s+hi Bob")
        self.assertEqual(line.locator("b, p").evaluate_all("all => all.map(e => e.translate)"), [False, True])
        self.assertFalse(self.shows(ann, "Bill joined").evaluate("line => line.translate"))

    def test_an_address_becomes_a_link(self):
        ann, bob, said = self.window("Ann"), self.guest("Bob"), []
        for marked in (  # what is in {} becomes a link
            "{https://a.example/Blur_(band)} ({https://a.example/Blur_(band)}), [{https://a.example/Blur_(band)}].",
            "{http://a.example/?b=c&d=%20#e}; ({https://b.example/d}.) or {HTTPS://C.EXAMPLE:80}?",
            "{https://b.example/1,2} 看{https://d.example/路}。好，{https://e.example}…",
            "“{https://a.example/x}” «{https://b.example}» '{https://c.example}' {https://a.example/Blur_(band)}!",
            "{https://a.example/}\u202egpj.exe {https://b.example}\u200b/c",
            "*{https://a.example}* <{https://b.example}> `{https://c.example}` javascript:alert(1), ftp://d, https://",
        ):
            bob.say(re.sub("[{}]", "", marked))
            said.append(re.sub("[{}]", "", marked))
            links = self.shows(ann, said[-1]).locator("a").evaluate_all(
                "links => links.map(a => [a.getAttribute('href'), a.textContent, a.rel, a.target])")
            self.assertEqual(links, [[link, link, "noreferrer", "_blank"] for link in re.findall("{(.*?)}", marked)])
        self.says(ann, said)

    def test_own_messages_stand_apart_also_after_a_reload(self):
        self.guest("Bob").say("hi all")
        page = self.window("Ann")
        self.post(page, "hi Bob")
        self.shows(page, "hi Bob")
        page.reload()
        expect(page.get_by_label("Nick")).to_have_value("Ann")
        page.get_by_role("button", name="Join").click()
        self.shows(page, "hi Bob")
        at_the_right = page.locator("#chat .message p").evaluate_all(
            "all => all.map(p => p.getBoundingClientRect()).map(box => box.left + box.right > innerWidth)")
        self.assertEqual(at_the_right, [False, True])
        tab = page.context.new_page()
        tab.goto(page.url)
        expect(tab.get_by_label("Nick")).not_to_have_value("Ann")

    def test_the_end_stays_in_view_at_any_zoom(self):
        pages = [self.window(f"{zoom}", device_scale_factor=zoom, size=(800, 500)) for zoom in (0.67, 1.1)]
        bob = self.guest("Bob")
        for i in range(60):
            bob.say(f"line {i}." + " and more" * (i % 31))
        for page in pages:
            expect(self.shows(page, "line 59.")).to_be_in_viewport(ratio=1)
            page.set_viewport_size({"width": 800, "height": 250})  # a keyboard comes up
            expect(self.shows(page, "line 59.")).to_be_in_viewport(ratio=1)

    def test_who_reads_further_up_stays_there_and_gets_back(self):
        ann, bob = self.window("Ann", size=(800, 500)), self.guest("Bob")
        for i in range(60):
            bob.say(f"line {i}.")
        place, newest = self.shows(ann, "line 45."), ann.get_by_role("button", name="Newest ↓")
        self.shows(ann, "line 59.")
        ann.locator("#room").hover()
        ann.mouse.wheel(0, -900)
        expect(newest).to_be_visible()
        top = place.bounding_box()["y"]
        for i in range(60, 66):  # the room talks on
            bob.say(f"line {i}.")
        self.shows(ann, "line 65.")
        self.assertAlmostEqual(place.bounding_box()["y"], top, delta=3)
        newest.click()
        expect(self.shows(ann, "line 65.")).to_be_in_viewport(ratio=1)
        expect(newest).to_be_hidden()
        expect(ann.locator("#room")).to_be_focused()
        ann.keyboard.press("PageUp")
        expect(newest).to_be_visible()
        self.post(ann, "whoever posts wants to see it")
        expect(self.shows(ann, "whoever posts")).to_be_in_viewport(ratio=1)

    def test_the_log_keeps_100_messages_however_many_come_and_go(self):
        ann, bob = self.window("Ann"), self.guest("Bob")
        for i in range(150):
            bob.say(f"line {i}.")
        self.shows(ann, "line 149.")
        for i in range(25):
            self.guest(f"Visitor {i}").vanish()
        self.shows(ann, "Visitor 24 left")
        self.says(ann, [f"line {i}." for i in range(50, 150)])
        self.assertIn(ann.locator("#chat .notice").count(), range(11, 40))

    def test_a_hidden_tab_counts_in_its_title(self):
        ann, bob = self.window("Ann"), self.guest("Bob")
        hide = """hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
                              document.dispatchEvent(new Event('visibilitychange')); }"""
        ann.evaluate(hide, True)
        for message in "one", "two":
            bob.say(message)
        expect(ann).to_have_title("(2) ScopyChat")
        ann.evaluate(hide, False)
        expect(ann).to_have_title("ScopyChat")

    def test_a_screen_reader_reads_what_is_new_but_not_the_history(self):
        bob = self.guest("Bob")
        bob.say("history")
        bob.until("history")
        ann = self.window()
        ann.evaluate("""() => {
            window.read = '';
            new MutationObserver(records => records.forEach(record => record.addedNodes.forEach(node => {
                read += record.target.ariaLive === 'polite' ? node.textContent : '';
            }))).observe(document.querySelector('#chat'), {childList: true});
        }""")
        self.join(ann, "Ann")
        self.runs(ann, lambda: ann.locator("#chat").get_attribute("aria-live") == "polite")
        self.post(ann, "my own line")
        self.shows(ann, "my own line")
        with self.offline(ann):
            self.runs(ann, lambda: len(ann.sockets) > 2)
        self.runs(ann)
        self.assertEqual(re.findall("history|my own line|connected|disconnected", ann.evaluate("read")),
                         ["my own line", "disconnected", "connected"])

    def test_axe_finds_nothing_and_small_screens_show_everything(self):
        need(AXE.exists(), "axe-core", "npm install --prefix .ci axe-core@4")
        page, bob = self.window(size=(320, 568), bypass_csp=True), self.guest()
        page.add_script_tag(path=AXE)

        def check():
            for scheme in "light", "dark":
                page.emulate_media(color_scheme=scheme)
                red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
                self.assertEqual(int(red) < 128, scheme == "dark")
                self.assertEqual(page.evaluate("async () => (await axe.run()).violations.map("
                                               "v => v.id + ': ' + v.nodes.map(n => n.html).join())"), [])

        check()
        self.join(page, "W" * 30)
        self.post(page, "x" * 1001)
        expect(page.locator("#chat .error")).to_be_in_viewport()
        page.get_by_label("Post as").fill("")
        bob.say("W" * 99, "Bob")
        for i in range(30):
            bob.say("the last line", f"User{i}")
        expect(page.get_by_text("the last line")).to_have_count(30)
        with self.offline(page):
            self.post(page, "on its way")
            expect(page.locator("header")).to_have_css("background-color", "rgb(179, 38, 30)")
            self.assertIn("not sent yet", page.locator("#sending").aria_snapshot())
            check()
            for width, height, lines in (320, 568, 5), (320, 256, 1), (740, 180, 1):  # 256: a desktop at 400 %
                page.set_viewport_size({"width": width, "height": height})
                self.assertEqual(page.locator("html").evaluate("h => [h.scrollWidth, h.scrollHeight]"), [width, height])
                for part in page.get_by_label("Post as"), page.get_by_role("button", name="Post"), *map(
                        page.get_by_text, ("on its way", "Reconnecting")):
                    expect(part).to_be_in_viewport(ratio=1)
                self.assertGreaterEqual(page.locator("#room li p").evaluate_all("""texts => texts.filter(text => {
                    const {left, right, top, bottom} = text.getBoundingClientRect();
                    return text.contains(document.elementFromPoint((left + right) / 2, (top + bottom) / 2));
                }).length"""), lines, (width, height))
            page.add_style_tag(content="html { font-size: 200%; }")
            page.set_viewport_size({"width": 320, "height": 568})
            self.assertEqual(page.locator("html").evaluate("html => html.scrollWidth"), 320)
            expect(page.get_by_text("on its way")).to_be_in_viewport()

    def test_a_phone_and_paper_and_forced_colours(self):
        page, bob = self.window("Ann", size=(360, 640), is_mobile=True, has_touch=True), self.guest("Bob")
        self.assertEqual(page.evaluate("document.documentElement.clientWidth"), 360)
        for i in range(40):
            bob.say(f"line {i}.")
        self.shows(page, "line 39.")
        page.emulate_media(media="print")
        self.assertGreater(page.evaluate("document.documentElement.scrollHeight"), 1200)
        page.emulate_media(media="screen", forced_colors="active")
        expect(page.locator("#chat p").last).to_have_css("border-top-width", "1px")

    def test_it_asks_before_something_unsent_is_closed(self):
        ann = self.window("Ann")
        for write in self.post, lambda page, text: page.get_by_label("Post as").fill(text):
            with self.offline(ann):
                write(ann, "wait for me")
                with ann.expect_event("dialog") as asked:
                    ann.close(run_before_unload=True)
                asked.value.dismiss()
            self.runs(ann)
            self.shows(ann, "wait for me")
        ann.get_by_label("Post as").fill("")
        with ann.expect_event("close"):
            ann.close(run_before_unload=True)


class TheReadme(PageTest):
    """What it says is so, and what it tells a reader to run, runs.  `.ci/run` runs its first two commands."""

    TEXT = (HERE / "README.md").read_text() if (HERE / "README.md").exists() else ""

    def block(self, language, words):  # the one code block in this language that has these words
        (block,) = [block for block in re.findall(rf"(?ms)^```{language}\n(.*?)^```$", self.TEXT) if words in block]
        return block

    def spawn(self, ready, *command, **more):  # start a program, and wait until it says that it is ready
        process = self.enterContext(subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more))
        self.addCleanup(process.terminate)
        too_late = threading.Timer(WAIT, process.kill)
        too_late.start()
        self.addCleanup(too_late.cancel)
        self.assertTrue(any(ready in line for line in process.stdout), f"{command[0]} did not say {ready!r}")
        too_late.cancel()
        return process

    def test_what_it_quotes_and_points_to_is_there(self):
        for command in "python server.py", "python -m unittest":
            self.assertTrue(self.block("sh", f"&& {command}").endswith(f"&& {command}\n"))
        script, page = (HERE / "server.py").read_text(), (HERE / "test.html").read_text()
        self.assertRegex(script, r'\A# /// script\n# requires-python = ">=3.11"\n.*"tornado>=6.6"]\n# ///\n')
        self.assertIn(self.block("python", "for con in connections"), script)
        self.assertIn(self.block("python", "def flush"), script)
        for line in self.block("js", "new WebSocket").splitlines():
            self.assertIn(line.strip(), page)
        for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)#\"]+)", self.TEXT):
            self.assertTrue("://" in target or (HERE / target).exists(), target)
        for name in re.findall(r"`([A-Za-z_]{4,})`", re.sub("(?s)## Beside.*## Exer", "", self.TEXT)):
            self.assertRegex(script + page, rf"\b{name}\b")

    def listens(self, port):
        with socket.socket() as there:
            return there.connect_ex(("127.0.0.1", port)) == 0

    def test_the_lines_that_would_start_the_chat_start_it(self):
        script = (HERE / "server.py").read_text()
        lines = re.search(r"(?m)^# This was the whole chat.*\n#\n((?:#     .*\n|#\n)+)", script)[1]
        start = re.sub("(?m)^#     |^#$", "", lines).replace("8888", f"{(port := free_port())}")
        code = f"import asyncio, sys\nsys.path.insert(0, {str(HERE)!r})\nfrom server import *\n{start}"
        process = self.enterContext(subprocess.Popen([sys.executable, "-c", code]))
        self.addCleanup(process.kill)
        self.eventually(lambda: self.listens(port), "it listens")
        ann, bob = (self.guest(nick, types.SimpleNamespace(port=port)) for nick in ("Ann", "Bob"))
        ann.say("hi")
        bob.until("hi")

    def test_behind_a_proxy_with_tls_and_under_a_path(self):
        need(shutil.which("caddy"), "Caddy", "install your system's package, on Debian `apt-get install caddy`")
        browser()
        site, chat, bob = f"localhost:{free_port()}", f"localhost:{self.chat.port}", self.guest("Bob")
        block = self.block("caddyfile", "reverse_proxy").replace("localhost:8888", chat)
        (self.folder / "Caddyfile").write_text(
            "{\nadmin off\nskip_install_trust\nauto_https disable_redirects\n}\n" + block.replace("chat.example.com {",
            f"{site} {{\ntls internal\nhandle_path /chat-app/* {{\nreverse_proxy {chat}\n}}"))
        self.spawn("serving initial configuration", "caddy", "run", "--config", "Caddyfile",
                   env={**os.environ, "XDG_DATA_HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder)})
        for path in "/", "/chat-app/":
            ann = self.window("Ann", url=f"https://{site}{path}", ignore_https_errors=True)
            self.post(ann, f"through the proxy, at {path}")
            bob.until(f"through the proxy, at {path}")
            self.assertEqual(ann.evaluate("ws.url"), f"wss://{site}{path}chat")
            ann.close()

    def test_one_room_in_two_processes(self):
        need(shutil.which("redis-server"), "Redis", "install your system's package, on Debian redis-server")
        need(importlib.util.find_spec("redis"), "redis for Python", "pip install redis")
        script, port = self.folder / "scale.py", free_port()
        script.write_text(self.block("python", "os, server"))
        self.assertLess(script.read_text().count("\n"), 40)
        start_redis = functools.partial(self.spawn, "Ready to accept connections", *f"redis-server --port {port} "
                                        "--bind 127.0.0.1 --appendonly yes --appendfsync always".split())
        start = functools.partial(self.start, script=script, env={
            **os.environ, "REDIS_URL": f"redis://localhost:{port}", "PYTHONPATH": str(HERE)})

        redis, chats = start_redis(), [start(), start()]
        ann, bob, cleo = guests = [*map(self.guest, ("Ann", "Bob", "Cleo"), (*chats, chats[0]))]
        ann.until("Bob joined")
        for guest in ann, bob:
            guest.say("twice", id="twice")
        for i in range(40):
            guests[i % 2].say(f"{i}")
        for guest in ann, bob:
            guest.say("the end")
        said = [[*guest.until("the end"), *guest.until("the end")] for guest in guests]
        said = [[line for line in lines if "nick" in line] for lines in said]
        heard = [[line["message"] for line in lines] for lines in said]
        self.assertEqual(sorted(heard[2]), sorted([*map(str, range(40)), "twice", "the end", "the end"]))
        for others in heard[:2]:  # whoever repeats is answered, too
            self.assertEqual(list(dict.fromkeys(others)), list(dict.fromkeys(heard[2])))

        redis.terminate()
        redis.wait(WAIT)
        ann.say("wait for Redis")
        start_redis()
        bob.until("wait for Redis")
        for guest in guests:
            guest.vanish()
        self.assertEqual([chat.stop() for chat in chats], [(0, "")] * 2)
        history = [line for line in self.guest(chat=start()).until("wait for Redis") if "nick" in line]
        self.assertEqual(history[:-1], said[2])  # with the times
