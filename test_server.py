"""What ScopyChat promises, seen from outside: over sockets, over HTTP, in a browser, in the server's log.

    python -m unittest                                                        all tests
    python -m unittest -v test_server.TheChat.test_everybody_hears_a_message  one of them

A test has a server process of its own, self.chat; guests, who talk to it over real sockets, and read only when told to;
and windows of a real browser.  To add one, start with this, in the class for the part that makes the promise:

    def test_bob_hears_ann(self):
        ann, bob = self.guest("Ann"), self.guest("Bob")
        self.assertEqual(bob.until(ann.say("hi"))[-1]["nick"], "Ann")

What is waited for must come within WAIT seconds; otherwise the test fails, and says what did not come.  `changes` is
Python code that runs before the server, for example to make a limit small.  With `clock`, the server's clock stands
still, and chat.later(20) moves it on.  At the end, each server must stop with status 0 and an empty log.  What a test
lacks, it names, and is skipped; with CI=true it fails instead.
"""
import asyncio
import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import unittest
import urllib.request

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
HANDSHAKE = ("GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
             "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")


def need(there, what, how):  # skip a test that lacks something, and say how to get it; with CI=true, fail
    if not there:
        problem = AssertionError if os.environ.get("CI") == "true" else unittest.SkipTest
        raise problem(f"{what} is absent. To run this test: {how}")


def eventually(there, what):  # wait until there() is true
    end = time.monotonic() + WAIT
    while not there():
        if time.monotonic() > end:
            raise AssertionError(f"within {WAIT} s, it did not come about that {what}")
        time.sleep(0.001)


@functools.cache
def folder():  # for what the tests write
    return unittest.enterModuleContext(tempfile.TemporaryDirectory())


def new_message(message, nick="Ann", **more):
    return {"type": "new_message", "nick": nick, "message": message, **more}


def frame(data, first=0x81):  # a client's frame (RFC 6455, 5.2), also a forbidden one; a mask of zeros changes nothing
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    size = bytes([0x80 | len(data)]) if len(data) < 126 else struct.pack("!BH", 0xfe, len(data))
    return bytes([first]) + size + bytes(4) + data


class Chat:
    """A server process on a free port, before which `changes` ran; or one that runs a `script` or another `program`."""

    CLOCK = """
import os, selectors, time
real, select = time.monotonic, selectors.DefaultSelector.select
time.monotonic = lambda: os.stat({!r}).st_mtime or real()
selectors.DefaultSelector.select = lambda self, timeout=None: select(self, min(0.01, 1 if timeout is None else timeout))
"""
    PROCESSES = multiprocessing.get_context("forkserver")  # copies of one that has imported all: they start at once
    PROCESSES.set_forkserver_preload(["server", "test_server"])

    def __init__(self, *options, changes="", clock=False, script=None, program=None, ready="is open", port=None, **env):
        self.port, self.stopped, path = port or self.free_port(), False, pathlib.Path(tempfile.mkdtemp(dir=folder()))
        self.out, self.log, self.clock = (path / name for name in ("out", "log", "clock"))
        for file in self.out, self.log, self.clock:
            file.touch()
        if clock:
            os.utime(self.clock, (1000, 1000))
            changes = self.CLOCK.format(str(self.clock)) + changes
        options = [f"--port={self.port}", *options]
        env = {**os.environ, "PYTHONUNBUFFERED": "", **env}  # The greeting must come by itself.
        self.process = self.PROCESSES.Process(daemon=True, target=self.serve, args=(
            program or script and [sys.executable, script, *options], options, changes, env, self.out, self.log))
        self.process.start()
        eventually(lambda: ready in self.out.read_text() + self.log.read_text() or self.process.exitcode is not None,
                   f"{script or program or 'the server'} says {ready!r}")

    @staticmethod
    def serve(command, options, changes, env, out, log):  # what the new process does
        for path, stream in (out, 1), (log, 2):
            os.dup2(os.open(path, os.O_WRONLY), stream)
        if command:
            os.chdir(out.parent)
            os.execvpe(command[0], command, env)
        import server
        sys.argv[1:] = options
        exec(changes, {"server": server})
        asyncio.run(server.main())

    @staticmethod
    def free_port():
        with socket.create_server(("127.0.0.1", 0)) as there:
            return there.getsockname()[1]

    def later(self, seconds):  # move the clock on, and wait until the server has done what is due
        os.utime(self.clock, ns=(0, self.clock.stat().st_mtime_ns + round(seconds * 1e9)))
        for _ in range(2):
            with contextlib.suppress(OSError):
                self.page()

    def page(self, host="localhost"):
        return urllib.request.urlopen(f"http://{host}:{self.port}/", timeout=WAIT).read().decode()

    def signal(self, signum):
        with contextlib.suppress(ProcessLookupError):  # It may be ending just now.
            if signum and self.process.exitcode is None:
                os.kill(self.process.pid, signum)

    def end(self, signum):
        os.utime(self.clock, (0, 0))  # From now on, it runs.
        self.signal(signum)

    def stop(self, signum=0):
        """Send it this signal, wait until it has ended, and return its exit status and its log."""
        self.end(signum)
        self.process.join(WAIT)
        self.process.kill()
        self.stopped = True
        return self.process.exitcode, self.log.read_text()

    def frozen(self):  # whatever happens meanwhile arrives at the server at one moment
        (end := contextlib.ExitStack()).callback(self.signal, signal.SIGCONT)
        self.signal(signal.SIGSTOP)
        return end


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
        return message

    def event(self, what, end):  # the response to the handshake, then one message after the other
        while not self.events:
            if not (closed := self.protocol.close_rcvd) and not select.select(
                    [self.socket], [], [], max(end - time.monotonic(), 0))[0]:
                raise AssertionError(f"{what!r} did not come within {WAIT} s; these came: {self.lines}")
            if closed or not (data := self.socket.recv(1 << 20)):
                raise ConnectionError(f"the server has hung up: {closed}")
            self.protocol.receive_data(data)
            self.events += (event for event in self.protocol.events_received() if getattr(event, "opcode", 1) == 1)
            self.raw(*self.protocol.data_to_send())  # it answers pings
        return self.events.pop(0)

    def list(self, what="a list", end=None):  # the next list of the server, with what is around it
        return json.loads(self.event(what, end or time.monotonic() + WAIT).data)

    def until(self, message=None):  # all lines up to the one with this message, or the next line
        lines, end = [], time.monotonic() + WAIT
        while not lines or message not in (None, lines[-1]["message"]):
            while not self.lines:
                self.lines += self.list(message, end)["data"]
            lines.append(self.lines.pop(0))
        return lines

    def line(self):
        return self.until()[0]

    def said(self, message):  # what people say, up to this message
        return [line["message"] for line in self.until(message) if "nick" in line]

    def vanish(self):  # it resets the connection, as when a machine crashes
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class ChatTest(unittest.TestCase):  # a test with servers, guests and strangers
    CHANGES = ""  # for self.chat

    @functools.cached_property
    def chat(self):
        return self.start(changes=self.CHANGES)

    def start(self, *options, **more):  # a server; how it ended is looked at when the tests of a class are over
        chat = Chat(*options, **more)
        self.addClassCleanup(lambda: chat.stopped or self.assertEqual(chat.stop(), (0, ""), self.id()))
        self.addCleanup(lambda: chat.stopped or chat.end(signal.SIGTERM))
        return chat

    def guest(self, nick=None, chat=None):
        need("ClientProtocol" in globals(), "websockets", "pip install websockets")
        guest = Guest((chat or self.chat).port, nick)
        self.addCleanup(guest.socket.close)
        return guest

    def stranger(self, text, chat=None):  # a connection, as a file, through which this text is sent
        with socket.create_connection(("127.0.0.1", (chat or self.chat).port), WAIT) as there:
            there.sendall(text.encode())
            return self.enterContext(there.makefile("rwb", 0))


class TheChat(ChatTest):
    def test_everybody_hears_a_message(self):
        ann, bob = self.guest("Ann"), self.guest("Bob")
        said = bob.until(ann.say("hi", "Bob", id="k3j9x"))[-1]  # She has joined as Ann, and stays Ann.
        self.assertEqual(ann.until("hi")[-1], said)
        self.assertAlmostEqual(said.pop("time"), time.time(), delta=60)
        self.assertEqual(said, {"type": "message", "nick": "Ann", "message": "hi", "id": "k3j9x"})
        ann.send({"type": "join", "nick": "Bob"})
        self.assertEqual(ann.line()["type"], "error")

    def test_joining_and_leaving_is_told_and_not_kept(self):
        cleo, ann = self.guest("Cleo"), self.guest("Ann")
        self.guest("Bob").vanish()
        for text, n in ("Bob joined", 3), ("Bob left", 2):
            self.assertEqual(ann.list(), {"type": "list", "data": [{"type": "notice", "message": text}], "online": n})
        self.assertEqual((nobody := self.guest()).list()["data"], [])
        nobody.vanish()  # Who never joined leaves without a word.
        eventually(lambda: ann.say("hi") and ann.list()["online"] == 2, "two are online")
        heard = [line["message"] for line in cleo.until(ann.say("the end")) if "nick" not in line]
        self.assertEqual(heard, ["Ann joined", "Bob joined", "Bob left"])

    def test_each_part_is_a_chat_and_heeds_an_edit(self):
        edit = """before = server.WSHandler.on_message
server.WSHandler.on_message = lambda self, data: before(self, data.replace("hi", "ho"))"""
        for handler in HANDLERS:
            chat = self.start("--handler", handler, changes=edit)
            ann, bob, cleo = self.guest("Ann", chat), self.guest("Bob", chat), self.guest(chat=chat)
            cleo.say("hi", "Cleo")  # as the post's own page does, without joining
            self.assertEqual(ann.until("ho")[-1]["nick"], "Cleo")
            cleo.say("hi \ud83d", "Cleo \ud83d")  # Half an emoji harms nobody.
            self.assertEqual([ann.line()["message"][:2], self.guest(chat=chat).line()["message"]], ["ho", "ho"])
            bob.vanish()
            ann.until("Bob left")

    def test_who_vanishes_is_offline_and_not_in_the_log(self):
        for handler in HANDLERS:
            chat = self.start("--handler", handler, changes=NO_PAUSE)
            ann, ghosts = self.guest("Ann", chat), [self.guest(nick, chat) for nick in ("Ghost", *[None] * 19)]
            for _ in range(40):  # more than TCP holds for those who do not read
                ann.until(ann.say("😀" * 1000))
            with chat.frozen():
                for ghost in ghosts:
                    ghost.vanish()
                    self.stranger(HANDSHAKE, chat).close()
            ann.until("Ghost left")
            eventually(lambda: ann.say("hi") and ann.list()["online"] == 1, "one is online")
            if handler in HANDLERS[:3]:
                chat.stop(signal.SIGKILL)  # These log it.


class ACrowd(ChatTest):
    def test_what_is_said_at_once_arrives_as_few_lists(self):
        guests, lists, said = [self.guest() for _ in range(30)], 0, []
        with concurrent.futures.ThreadPoolExecutor(20) as pool, self.chat.frozen():
            newcomers = [pool.submit(self.guest) for _ in range(20)]
            for i in range(60):
                guests[i % 30].say(f"{i}")
        while len(said) < 60:
            said += [line["message"] for line in guests[0].list()["data"]]
            lists += 1
        self.assertLess(lists, 20)
        guests[0].say("the end")
        for guest in *guests[1:], *(newcomer.result() for newcomer in newcomers):  # all hear all, in one order
            self.assertEqual(guest.said("the end")[:-1], said)
        self.assertEqual(sorted(said, key=lambda i: int(i) % 30), [f"{i + j}" for i in range(30) for j in (0, 30)])

    def test_an_error_while_sending_shows_a_traceback_and_ends_nothing(self):
        ann = self.guest("Ann", chat := self.start(changes="""before = server.send_to_all
server.send_to_all = lambda entries: before(1 / ("oh" not in str(entries)) and entries)"""))
        ann.say("oh")
        eventually(lambda: "Traceback" in chat.log.read_text(), "the log shows it")
        ann.until(ann.say("once more"))
        chat.stop(signal.SIGKILL)


class ANetworkThatFails(ChatTest):
    def test_repetitions_of_the_last_10000_are_answered_to_their_senders(self):
        chat = self.start(changes=NO_PAUSE)
        ann, bob = self.guest(chat=chat), self.guest(chat=chat)
        once = ann.until(ann.say("once", id="k3j9x"))[0]
        for i in range(11):
            ann.socket.sendall(b"".join(frame(new_message(f"{i}-{j}")) for j in range(909)))  # 9999, each gets an id
            ann.until(f"{i}-908")
        ann.say("once more", id="k3j9x")
        ann.say("the last that fits")
        ann.say("forgotten", id="k3j9x")
        self.assertEqual(ann.line(), once)
        self.assertEqual(ann.said("forgotten"), ["the last that fits", "forgotten"])
        heard = bob.said("forgotten")
        self.assertEqual([heard[0], *heard[-3:]], ["once", "10-908", "the last that fits", "forgotten"])
        self.assertEqual([self.guest(chat=chat).said("forgotten"), len(heard)], [heard[-100:], 10_002])

    def test_who_is_back_already_neither_joins_nor_leaves(self):
        ann, old, new = self.guest("Ann"), self.guest("Bob"), self.guest()
        ann.until("Bob joined")
        new.send({"type": "join", "nick": "Bob"})
        new.until(new.say("I am back"))
        old.vanish()
        eventually(lambda: new.say("hi") and new.list()["online"] == 2, "two are online")
        new.vanish()
        self.assertEqual([line["message"] for line in ann.until("Bob left") if "nick" not in line], ["Bob left"])

    def test_a_heartbeat_comes_every_10_seconds(self):
        for clock in "", "server.time.time = lambda: 1e9 - 3600 * server.time.monotonic()":  # set back all the time
            chat = self.start(changes=clock, clock=True)
            ann, bob = self.guest(chat=chat), self.guest(chat=chat)
            for i in range(4):  # The first is the empty history.
                self.assertEqual(bob.list(), {"type": "list", "data": [], "online": 2})
                chat.later(9.9)
                ann.say(f"{i}")
                self.assertEqual(len(bob.list()["data"]), 1)
                chat.later(0.1)

    def test_who_answers_no_ping_for_20_seconds_is_disconnected(self):
        silent = self.guest(chat=(chat := self.start(clock=True)))
        silent.raw = lambda *data: None
        for seconds in 0, 20, 19.9:  # the first ping, and not quite the second
            chat.later(seconds)
            silent.until(silent.say(f"{seconds}"))
        chat.later(0.2)
        self.assertRaisesRegex(ConnectionError, "ping timed out", silent.until, "the end")


class Strangers(ChatTest):
    CHANGES = NO_PAUSE
    BLANK = "", " \t\n", "\u200b\xad\u2060\ufeff", "\ufe0f", "\x00"
    BAD = [  # what a client may send by mistake or on purpose, and what the answer must match
        *((bad, "JSON object") for bad in (
            "hello", "", "{", '"text"', "[]", "3", "null", "[" * 8000, '{"a":' * 1300, "9" * 8000, {"type": ["join"]},
            frame(b"\x00\xff", 0x82), {}, {"type": "list"})),
        *(({**sent, field: bad}, f"{field} must") for bad in (None, 3, ["Ann"], {"a": 1}, *BLANK) for sent, field in (
            ({"type": "join"}, "nick"), *((new_message("hi"), field) for field in ("nick", "message", "id")))),
        *(({"type": "join", "id": "i" * length}, "Missing: nick") for length in range(20, 40)),  # 28: a longer header
        ({"type": "new_message"}, "Missing: message, nick"), ({"type": "new_message", "message": ""}, "Missing: nick"),
        *((new_message("hi", **{name: "x"}), "no other fields") for name in ("time", "online", "\ud800")),
        ({"type": "join", "nick": "n" * 31}, "nick has 31 .* 30"), (new_message("hi", id="i" * 65), "id has 65 .* 64"),
        (new_message("m" * 1001, id="k3j9x"), "1,001 .* 1,000"), (new_message(" " * 30000), "30,000"),
    ]
    ODD = ("ශ්\u200dරී", "علی\u200cرضا", "🏳️\u200d🌈", "a\x00", "\u2028b", "\u202eabc", "\U0001faff", " e\u0301 ",
           "Q" + "\u0316" * 29)

    def test_bad_input_is_answered_in_words_to_its_sender_alone(self):
        ann, bob = self.guest("Ann"), self.guest()
        for bad, words in self.BAD:
            with self.subTest(str(bad)[:60]):
                (bob.raw if isinstance(bad, bytes) else bob.send)(bad)
                error = bob.line()
                self.assertRegex(error.pop("message"), words)
                id = bad.get("id") if isinstance(bad, dict) else None
                self.assertEqual(error, {"type": "error", "id": id if isinstance(id, str) else None})
        for abuse in frame(b"\xff\xfe"), frame(b"x" * 32769), frame(b"x", 0x01) + frame(b"x" * 200, 0x00) * 170:
            (cleo := self.guest()).raw(abuse)  # not text, or more than 32 KiB
            self.assertRaises(ConnectionError, cleo.until, "the end")
        self.assertEqual(len(ann.until(bob.say("still here"))), 1)

    def test_what_is_allowed_is_relayed_as_it_is(self):
        ann, bob = self.guest(), self.guest()
        for nick, message in ("😀" * 30, "😀" * 1000), *((odd, odd + "</script>\n") for odd in self.ODD):
            for ascii in True, False:
                sent = new_message(message, nick, id=f"{ascii}{nick}".ljust(64, "😀"))
                ann.send(json.dumps(sent, ensure_ascii=ascii))
                for said in ann.line(), bob.line():
                    self.assertGreater(said.pop("time"), 1e9)
                    self.assertEqual(said, {**sent, "type": "message"})
        ann.say("привет")  # in two bytes a letter, and not in six
        self.assertIn("привет".encode(), bob.event("привет", time.monotonic() + WAIT).data)

    def test_one_client_is_heard_50_times_a_second(self):
        chat = self.start(clock=True)
        ann, bob, flooder = self.guest("Ann", chat), self.guest(chat=chat), self.guest("Flooder", chat)
        chat.later(0.021)  # its pause after it has joined
        flooder.raw(*(frame(new_message(f"{i}")) for i in range(2000)))
        bob.until("0")
        for i in "123":
            chat.later(0.019)
            self.assertEqual(len(bob.said(ann.say(f"before {i}"))), 1)
            chat.later(0.002)
            self.assertEqual(bob.line()["message"], i)
        flooder.vanish()
        for _ in "123":  # Two more are heard, and then none of the nearly 2,000 that are left.
            chat.later(0.021)
        ann.until("Flooder left")

    def test_pages_of_other_sites_and_uploads_are_refused(self):
        upload = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx"  # without the rest
        for request, status in (f"{HANDSHAKE[:-2]}Origin: http://b\r\n\r\n", "403"), (upload, "400"):
            self.assertIn(f" {status} ", self.stranger(request).readline().decode())
        self.assertRegex(self.chat.stop(signal.SIGTERM)[1], r"\A403 GET /chat .*\n\Z")


class Speed(ChatTest):
    LONG = NO_PAUSE + """; server.LENGTHS.update(message=60_000)
server.application.settings["websocket_max_message_size"] = 80_000"""

    def test_who_reads_nothing_is_slowed_down_and_then_disconnected(self):
        for handler in HANDLERS[3:]:
            chat = self.start("--handler", handler, changes=self.LONG, clock=True)
            ann, deaf, heard = self.guest("Ann", chat), self.guest("Deaf", chat), []
            for _ in range(120):  # 7 MB
                ann.until(ann.say("x" * 60_000))
            chat.later(1)
            deaf.raw(*(frame(new_message(f"{i}")) for i in range(30)))
            while "Deaf left" not in heard:
                chat.later(0.5)
                heard += [line["message"] for line in ann.until(ann.say("half a second"))]
            self.assertIn(heard.count("half a second"), range(37, 44))  # It goes after 20 seconds,
            self.assertIn(sum(map(str.isdigit, heard)), range(17, 24))  # and is heard once a second.

    def test_who_reads_slowly_gets_all_from_one_copy(self):
        need(sys.platform == "linux", "/proc", "use Linux")
        chat = self.start(changes=self.LONG, clock=True)
        ann, *slow = (self.guest(chat=chat) for _ in range(20))
        pages = pathlib.Path(f"/proc/{chat.process.pid}/statm")  # of memory
        before = int(pages.read_text().split()[1])
        for batch in range(4):
            for i in range(60):
                ann.say("x" * 60_000)
                ann.until(ann.say(f"{i}"))
            self.assertLess(int(pages.read_text().split()[1]) - before, 10_000)  # 40 MB; 19 times what waits is 100
            for guest in slow * (batch > 0):  # They are always behind, but never for 20 seconds.
                self.assertEqual([m for m in guest.said("59") if m[0] != "x"], [f"{i}" for i in range(60)])
            chat.later(15)


class HowItStarts(ChatTest):
    def test_it_serves_this_machine_alone_unless_told_otherwise(self):
        need(sys.platform == "linux", "127.0.0.2, another address of this machine", "use Linux")
        for options, host in ([], "localhost"), (["--address="], "localhost"), (["--address=::1"], "[::1]"):
            chat = self.start(*options, script=SCRIPT)
            self.assertIn(f" http://{host}:{chat.port}/ ", chat.out.read_text())
            self.assertIn("Welcome to ScopyChat", chat.page(host))
            self.assertRaises(OSError, chat.page, "127.0.0.2")
            self.assertEqual(chat.stop(signal.SIGINT), (0, ""))  # Ctrl+C
        self.assertIn("Welcome to ScopyChat", self.start("--address=0.0.0.0").page("127.0.0.2"))

    def test_options_have_defaults_and_wrong_ones_get_one_clear_line(self):
        self.assertRegex(Chat("--help", script=SCRIPT).out.read_text(), r"--port PORT +default: 8888\n")
        wrong = {**{f"--port={port}": "port" for port in ("x", 99999, 0, self.chat.port)}, "--prot=1": "--prot",
                 "--address=no.invalid": "no.invalid", "--address=..": "listen", "--handler=Chat": ".*".join(HANDLERS)}
        for option, words in wrong.items():
            status, log = Chat(option, script=SCRIPT).stop()
            self.assertRegex(f"{status} {log}", rf"\A[12] (usage: .*\n( .*\n)*)?.*{words}.*\n\Z")

    def test_each_visit_gets_todays_page_with_a_new_name(self):
        chat = self.start(changes=f"server.MainHandler.get_template_path = lambda self: {folder()!r}")
        for guest, title in ("User1", "Welcome to ScopyChat"), ("User2", "Edited"):
            page = (HERE / "test.html").read_text().replace("Welcome to ScopyChat", title)
            pathlib.Path(folder(), "test.html").write_text(page)
            self.assertRegex(chat.page(), rf'<h1>{title}</h1>(?s:.*) value="{guest}"')

    def test_when_files_run_out_newcomers_are_hung_up_on(self):
        chat = self.start(changes="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))")
        room = [self.guest("Ann", chat)]
        while room[-1].status:
            room.append(self.guest(chat=chat))
        self.assertIn(len(room), range(25, 60))
        self.assertEqual({self.guest(chat=chat).status for _ in range(100)}, {None})
        room[1].until(room[0].say("we talk on"))
        room[2].vanish()
        eventually(lambda: self.guest(chat=chat).status, "there is room again")

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

    def test_a_stop_sends_what_has_just_arrived_and_a_goodbye(self):
        ann, bob = self.guest("Ann"), self.guest("Bob")
        with self.chat.frozen():
            ann.say("the end")
            self.chat.signal(signal.SIGINT)
            self.chat.signal(signal.SIGTERM)  # A second signal changes nothing.
        bob.until("the end")
        for guest in ann, bob:
            self.assertRaisesRegex(ConnectionError, "1001 .*the server stops", guest.until, "more")

    def test_who_answers_no_goodbye_does_not_hold_it_up(self):
        chat = self.start(clock=True)
        silent, newcomer = self.stranger(HANDSHAKE, chat), self.stranger(HANDSHAKE[:-2], chat)
        for _ in range(20):
            self.guest(chat=chat).raw((frame(new_message("flood")) + frame(b"bad")) * 1000)
        chat.later(0)  # by now, the server has read both
        chat.signal(signal.SIGTERM)
        for i in range(50):  # within 2.5 seconds, of which the goodbye takes 2.1
            chat.later(0.05)
            chat.process.join(0.02)
            if i == 10:
                newcomer.write(HANDSHAKE[-2:].encode())  # it comes in when the others have got their goodbye
        for stranger in silent, newcomer:
            self.assertIn(b"\x03\xe9the server stops", stranger.read())
        self.assertEqual(chat.stop(), (0, ""))


class PageTest(ChatTest):
    """A test with windows of a browser.  A window's clock runs on by page.clock; window.ws is its socket."""

    CHANGES = NO_PAUSE
    NETWORK = r"(?s:// ==== A network that fails.*?(?=\}\);\s*</script>))"  # the parts that can be cut out
    COMFORT = r"(?s:<!-- Comfort.*(?=</body>))"
    CORS = {"Access-Control-Allow-Origin": "*"}  # as the CDN answers
    LOW = {"width": 800, "height": 500}

    @staticmethod
    @functools.cache
    def browser():  # one for all tests
        need("sync_playwright" in globals(), "Playwright", "pip install playwright")
        need(CHROMIUM, "Chromium", "install your system's package, on Debian `apt-get install chromium`")
        need(JQUERY.exists(), "jQuery", "npm install --prefix .ci jquery@4.0.0")
        expect.set_options(timeout=WAIT * 1000)
        return unittest.enterModuleContext(unittest.enterModuleContext(sync_playwright()).chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-features=LocalNetworkAccessChecks"]))

    def window(self, nick=None, url=None, clock=None, cut=None, jquery=None, **options):
        """Return a page, in which this nick has joined.  What matches `cut` is cut out of it."""
        errors = []  # of the page's script
        self.addCleanup(lambda: jquery or self.assertEqual(errors, []))
        context = self.enterContext(self.browser().new_context(**options))
        context.set_default_timeout(WAIT * 1000)
        context.route("https://code.jquery.com/**", jquery or (lambda r: r.fulfill(path=JQUERY, headers=self.CORS)))
        page = context.new_page()
        page.sockets = []
        page.on("websocket", lambda socket: page.sockets.append(socket))
        page.on("pageerror", lambda error: errors.append(error))
        page.clock.install(time=clock)
        if cut:
            page.route("**/", lambda route: route.fulfill(body=re.sub(cut, "", route.fetch().text())))
        page.goto(url or f"http://localhost:{self.chat.port}/", wait_until="commit" if jquery else "load")
        if nick:
            self.join(page, nick)
        return page

    def join(self, page, nick):
        self.post(page, nick, label="Nick")
        self.shows(page, f"{nick.strip()} joined")

    def post(self, page, *messages, label="Post as"):
        for message in messages:
            page.get_by_label(label).fill(message)
            page.get_by_label(label).press("Enter")
        return message

    def shows(self, page, text):  # the last line in the log with this text, when it has come
        line = page.locator("#chat li", has_text=text).last
        line.wait_for(state="attached")
        return line

    def says(self, page, messages):  # wait until the log has exactly these messages
        expect(page.locator("#chat .message p")).to_have_text(messages)

    def offline(self, page, chance=1):  # its connection breaks, and it gets no new one, however long it waits
        page.evaluate("chance => { Math.random = () => chance; ws.close(); }", chance)
        eventually(lambda: page.evaluate("ws.readyState") == 3, "its connection is closed")
        (end := contextlib.ExitStack()).callback(page.context.set_offline, False)
        page.context.set_offline(True)
        return end

    def runs(self, page, until=lambda page: "online" in page.locator("#status").text_content()):
        # Let its clock run until this.  In each pause of 20 ms, what was sent meanwhile arrives.
        eventually(lambda: until(page) or page.clock.run_for(3000) or page.wait_for_timeout(20), "it is online again")


class ThePage(PageTest):  # its part "The chat"
    def test_two_windows_talk_and_markup_is_text(self):
        ann, bob, markup = self.window("  Ann "), self.window("<img src=x>"), "<img src=x onerror=alert(1)><b>bold</b>"
        self.post(ann, "hello", "   ", "", markup)
        self.post(bob, "hi Ann")
        for page in ann, bob:
            expect(page.locator("#chat :is(.message, .error) p")).to_have_text(["hello", markup, "hi Ann"])
            expect(page.get_by_text("2 online")).to_be_visible()
        self.assertEqual(bob.locator("#chat b").first.text_content(), "Ann")
        self.assertRaisesRegex(Exception, "TrustedHTML", ann.evaluate, "$('#chat').append('<b>a second wall</b>')")
        bob.close()
        self.shows(ann, "<img src=x> left")

    def test_a_nick_is_suggested_and_keys_suffice(self):
        page = self.window()
        self.assertRegex(page.get_by_label("Nick").input_value(), r"^User\d+$")
        page.keyboard.type("\u200b\n")  # typed over the suggestion; nobody can see it
        expect(page.get_by_label("Nick")).to_have_value("\u200b")
        page.get_by_label("Nick").fill("")
        page.keyboard.type("n" * 31 + "\nhi")
        self.shows(page, "n" * 30 + " joined")
        page.get_by_role("button", name="Post").click()
        page.keyboard.type("the caret is there\n")
        self.says(page, ["hi", "the caret is there"])
        page.keyboard.press("Shift+Tab")
        expect(page.get_by_role("region", name="Conversation")).to_be_focused()  # the arrow keys scroll it

    def test_the_chat_alone_is_a_chat(self):
        ann, bob = self.window("Ann", cut=f"{self.NETWORK}|{self.COMFORT}"), self.guest("Bob")
        bob.say("hello")
        expect(ann.locator("#chat .message")).to_have_text(["Bob hello"])
        bob.vanish()
        self.chat.stop(signal.SIGTERM)
        self.shows(ann, "chat server disconnected: 1001 the server stops")
        expect(ann.get_by_label("Post as")).to_be_hidden()
        self.chat = self.start(port=self.chat.port)
        ann.get_by_role("button", name="Join").click()
        self.shows(ann, "Ann joined")
        self.post(ann, "I am back")
        self.says(ann, ["I am back"])

    def test_without_the_published_jquery_nobody_can_join(self):
        page = self.window(jquery=lambda route: route.fulfill(body=JQUERY.read_bytes() + b" ", headers=self.CORS))
        page.wait_for_load_state()
        expect(page.get_by_text("Waiting for jQuery")).to_be_visible()
        expect(page.get_by_label("Nick")).to_be_hidden()

    def test_without_javascript_it_says_so(self):
        page = self.window(java_script_enabled=False, jquery=lambda route: route.abort())
        expect(page.locator("noscript")).to_be_visible()
        expect(page.get_by_text("jQuery")).to_be_hidden()


class ThePageOnANetworkThatFails(PageTest):
    def test_it_sends_again_what_a_restarted_server_forgot(self):
        ann = self.window("Ann")
        self.shows(ann, self.post(ann, "long ago"))
        ann.clock.run_for(61_000)
        self.shows(ann, self.post(ann, "before"))
        self.chat.stop(signal.SIGTERM)
        self.shows(ann, "chat server disconnected: 1001 the server stops")
        self.post(ann, "<b>meanwhile</b>", "and this")
        expect(ann.locator("#sending li")).to_have_text(["<b>meanwhile</b>", "and this"])
        self.chat = self.start(port=self.chat.port, changes=NO_PAUSE)
        self.runs(ann)
        self.post(ann, "and now")
        self.says(ann, ["long ago", *(history := ["before", "<b>meanwhile</b>", "and this", "and now"])])
        self.assertEqual(self.guest().said("and now"), history)

    def test_it_notices_a_dead_network_in_20_seconds(self):
        ann, bob = self.window("Ann", cut=self.COMFORT), self.guest("Bob")  # it works without comfort
        with self.chat.frozen():
            ann.clock.run_for(18_000)
            expect(ann.locator("#status")).to_contain_text("online")
            ann.clock.run_for(2_500)
            self.assertEqual(ann.get_by_text("chat server disconnected: no answer").count(), 1)
            self.post(ann, "can you hear me?")
            self.runs(ann, lambda ann: len(ann.sockets) > 2)  # an attempt that meets silence is not the last one
        self.runs(ann)
        bob.until("can you hear me?")
        for message in "yes", "go on":
            self.shows(ann, bob.say(message))
            ann.clock.run_for(12_000)  # each list starts the 20 seconds anew
        expect(ann.get_by_text("chat server disconnected")).to_have_count(1)
        expect(ann.get_by_text("2 online")).to_be_visible()  # it has one connection, and not two

    def test_it_comes_back_after_a_random_pause(self):
        ann = self.window("Ann")
        ann.locator("#room").focus()
        ann.clock.pause_at(time.time() + 2)
        for chance, pause in (0, 1000), (0.999, 4996):
            ann.clock.run_for(16_000)  # after 20 s, it would give up, but its connection is lost before
            with self.offline(ann, chance):
                ann.clock.run_for(pause - 100)
                self.assertEqual(ann.evaluate("ws.readyState"), 3)  # closed: it has not tried yet
            ann.clock.run_for(200)
            expect(ann.locator("#status")).to_contain_text("online")
        ann.clock.run_for(6000)
        ann.wait_for_timeout(100)  # until Playwright would have heard of one more
        expect(ann.locator("#room")).to_be_focused()  # It has not taken the focus,
        self.assertEqual(len(ann.sockets), 3)  # nor did it try once more.

    def test_nothing_is_lost_or_doubled_through_cuts_and_restarts(self):
        pages, bob, lines = [self.window(nick) for nick in "AB"], self.guest(), [f"{i}." for i in range(94)]
        for line in lines[24:]:
            bob.say(line, "Cleo")
        bob.until(lines[-1])
        bob.vanish()
        for page in pages:
            page.evaluate("Math.random = () => -0.24")  # it comes back soon
        for i, line in enumerate(lines[:24]):
            self.post(pages[i % 2], line)
            if i % 4 == 0:
                pages[i // 4 % 2].evaluate("ws.close()")
            if i == 16:  # it freezes, and at 18 it dies: what comes in between is lost
                self.chat.signal(signal.SIGSTOP)
            if i in (9, 18):
                self.chat.stop(signal.SIGTERM if i == 9 else signal.SIGKILL)
            if i in (13, 20):
                self.chat = self.start(port=self.chat.port, changes=NO_PAUSE)
        for page in pages:
            expect(page.locator("#chat .message")).to_have_count(len(lines))
            expect(page.locator("#sending li")).to_have_count(0)
            self.assertEqual(sorted(page.locator("#chat .message p").all_text_contents()), sorted(lines))

    def test_refused_messages_return_and_the_page_stays_connected(self):
        ann, long = self.window("Ann"), [letter * 1240 for letter in "abc"]
        field = ann.get_by_label("Post as")
        with self.offline(ann):
            self.post(ann, *long)
            field.fill("a draft")
        self.runs(ann)
        expect(field).to_have_value(" ".join(["a draft", *long]))
        expect(ann.locator("#sending li")).to_have_count(0)
        expect(ann.get_by_text("The message has 1,240 characters.  At most 1,000 are").last).to_be_in_viewport()
        with self.offline(ann):
            self.post(ann, *["\x01" * 5500] * 3)  # cut to 5000, each of which needs six bytes, the most there is
        self.runs(ann)
        expect(field).to_have_value("\x01" * 5000)
        field.press("Enter")
        self.shows(ann, self.guest().say("the end"))
        for text, count in ("The message has", 7), ("disconnected", 2):
            self.assertEqual(ann.get_by_text(text).count(), count)


class ThePageIsComfortable(PageTest):
    def test_names_times_and_dates_head_what_is_said(self):
        times = [1351384200 + seconds for seconds in (0, 20, 3600, 3680, 90000)]  # from 02:30 on 28 October 2012
        self.chat = self.start(changes=f"""{NO_PAUSE}; import time, types; times = iter({times})
server.time = types.SimpleNamespace(time=lambda: next(times), monotonic=time.monotonic)""")
        bob = self.guest()
        for i, _ in enumerate(times):
            bob.until(bob.say(f"{i}", "Bob"))
        page = self.window("Ann", timezone_id="Europe/Berlin", locale="en-GB", clock=times[-1] + 500_000)
        shown = page.locator("#chat b, #chat time, #chat .notice").filter(visible=True).all_text_contents()
        self.assertEqual(re.sub(", ", " ", "|".join(shown[1:-1])), "Sunday 28 October 2012|Bob|02:30|Bob|02:30|"
                         "Bob|02:31|Monday 29 October 2012|Bob|02:30")  # An hour repeats.

    def test_each_script_has_its_direction_and_each_line_its_place(self):
        ann = self.window()
        for label in "Nick", "Post as":
            ann.get_by_label(label).fill("مرحبا")
            expect(ann.get_by_label(label)).to_have_css("direction", "rtl")
            ann.keyboard.press("Enter")
        self.shows(ann, self.guest().say("مرحبا Bob!", "Bob"))
        expect(ann.locator("#chat .message p").last).to_have_css("unicode-bidi", "plaintext")
        for part in "#chat .message", "#chat .message p", "#post label":  # Piled accents stay in it.
            expect(ann.locator(part).last).to_have_css("overflow", "clip")

    def test_an_address_becomes_a_link(self):
        ann, bob = self.window("Ann"), self.guest("Bob")
        for marked in (  # what is in {} becomes a link
            "{https://a.example/Blur_(band)} ({https://a.example/Blur_(band)}), [{https://a.example/Blur_(band)}].",
            "{http://a.example/?b=c&d=%20#e}; ({https://b.example/d}.) or {HTTPS://C.EXAMPLE:80}?",
            "{https://b.example/1,2} 看{https://d.example/路}。好，{https://e.example}…",
            "“{https://a.example/x}” «{https://b.example}» '{https://c.example}' {https://a.example/Blur_(band)}!",
            "\u202e{https://a.example/}\u202egpj.exe {https://b.example}\u200b/c",
            "*{https://a.example}* <{https://b.example}> `{https://c.example}` javascript:alert(1), ftp://d, https://",
        ):
            links = self.shows(ann, bob.say(re.sub("[{}]", "", marked))).locator("a").evaluate_all(
                "links => links.map(a => [a.getAttribute('href'), a.textContent, a.rel, a.target, a.dir])")
            self.assertEqual(links, [[a, a, "noreferrer", "_blank", "ltr"] for a in re.findall("{(.*?)}", marked)])

    def test_a_reload_keeps_the_nick_and_ones_own_messages(self):
        self.guest("Bob").say("hi all")
        page = self.window(nick := "ශ්\u200dරී علی\u200cرضا 🏳️\u200d🌈 ❤️")
        for hi in self.post, self.shows:
            page.reload()
            expect(page.get_by_label("Nick")).to_have_value(nick)
            page.get_by_role("button", name="Join").click()
            hi(page, "hi Bob")
        own = self.shows(page, "hi Bob")
        self.assertEqual([own.locator("b").text_content(), page.get_by_text("Post as").text_content()],
                         [nick, "Post as " + nick])  # as it was typed, and as it stays in translation
        self.assertEqual(own.locator("b, p").evaluate_all("all => all.map(e => e.translate)"), [False, True])
        self.assertGreater(min(own.locator(part).bounding_box()["x"] for part in "bp"), 640)  # at the right
        tab = page.context.new_page()
        tab.goto(page.url)
        expect(tab.get_by_label("Nick")).not_to_have_value(nick)

    def test_the_end_of_100_messages_stays_in_view(self):
        pages = [self.window(f"{z}", viewport=self.LOW, device_scale_factor=z, is_mobile=z > 1) for z in (0.67, 1.1)]
        bob, lines = self.guest("Bob"), [f"line {i}." + " and more" * (i % 31) for i in range(150)]
        for line in lines:
            bob.say(line)
        bob.until(lines[-1])
        for i in range(25):
            self.guest(f"Visitor {i}").vanish()
        for page in pages:
            expect(self.shows(page, "Visitor 24 left")).to_be_in_viewport(ratio=1)
            page.set_viewport_size({"width": 800, "height": 250})  # a keyboard comes up
            expect(self.shows(page, "Visitor 24 left")).to_be_in_viewport(ratio=1)
            self.says(page, lines[-100:])
            self.assertIn(page.locator("#chat .notice").count(), range(11, 40))
            self.assertEqual(page.evaluate("document.documentElement.clientWidth"), 800)

    def test_who_reads_further_up_stays_there_and_gets_back(self):
        ann, bob = self.window("Ann", viewport=self.LOW), self.guest("Bob")
        for i in range(60):
            bob.say(f"line {i}.")
        self.shows(ann, "line 59.")
        place, newest = self.shows(ann, "line 45."), ann.get_by_role("button", name="Newest ↓")
        ann.locator("#room").hover()
        ann.mouse.wheel(0, -900)
        expect(newest).to_be_visible()
        top = place.bounding_box()["y"]
        self.shows(ann, bob.say("the room talks on"))
        self.assertAlmostEqual(place.bounding_box()["y"], top, delta=3)
        newest.click()
        expect(newest).to_be_hidden()
        expect(self.shows(ann, "the room talks on")).to_be_in_viewport(ratio=1)
        ann.keyboard.press("PageUp")  # The room has the focus.
        expect(newest).to_be_visible()
        expect(self.shows(ann, self.post(ann, "whoever posts wants to see it"))).to_be_in_viewport(ratio=1)

    def test_a_hidden_tab_counts_in_its_title(self):
        ann, bob = self.window("Ann"), self.guest("Bob")
        self.shows(ann, bob.say("seen"))
        ann.evaluate("Object.defineProperty(document, 'hidden', {get: () => hidden}); hidden = true")
        for guest in bob, self.guest("Cleo"):
            guest.say("unseen")
        expect(ann).to_have_title("(2) ScopyChat")
        ann.evaluate("hidden = false; document.dispatchEvent(new Event('visibilitychange'))")
        expect(ann).to_have_title("ScopyChat")

    def test_a_screen_reader_reads_news_but_not_the_history(self):
        (bob := self.guest("Bob")).until(bob.say("history"))
        ann = self.window()
        ann.evaluate("""read = [], new MutationObserver(records => records.forEach(record => {
            if (record.target.ariaLive === 'polite') { read.push(...record.addedNodes); }
        })).observe(document.querySelector('#chat'), {childList: true})""")
        self.join(ann, "Ann")
        self.runs(ann, lambda ann: ann.locator("#chat").get_attribute("aria-live") == "polite")
        self.shows(ann, self.post(ann, "my own line"))
        with self.offline(ann):
            self.runs(ann, lambda ann: len(ann.sockets) > 2)
        self.runs(ann)
        read = ann.evaluate("read.map(line => line.textContent.match(/history|my own line|(dis)?connected/)?.[0])")
        self.assertEqual([*filter(None, read)], ["my own line", "disconnected", "connected"])

    def test_axe_finds_nothing_and_small_screens_show_everything(self):
        need(AXE.exists(), "axe-core", "npm install --prefix .ci axe-core@4")
        page, bob = self.window(viewport={"width": 320, "height": 568}, bypass_csp=True), self.guest()
        page.add_script_tag(path=AXE)

        def check():
            for scheme, canvas in ("light", "rgb(255, 255, 255)"), ("dark", "rgb(18, 18, 18)"):
                page.emulate_media(color_scheme=scheme)
                expect(page.locator("body")).to_have_css("background-color", canvas)
                self.assertEqual(page.evaluate("async () => (await axe.run()).violations.map("
                                               "v => v.id + ': ' + v.nodes.map(n => n.html).join())"), [])

        check()
        self.join(page, "W" * 30)
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
                for part in map(page.locator, ("#message", "#post [type=submit]", "#sending p", "#status")):
                    expect(part).to_be_in_viewport(ratio=1)
                expect(page.locator("#room li p").nth(-lines)).to_be_in_viewport(ratio=1)
            page.add_style_tag(content=":root { font-size: 200% !important; }")
            page.set_viewport_size({"width": 320, "height": 568})
            self.assertEqual(page.locator("html").evaluate("html => html.scrollWidth"), 320)
            self.assertGreater(page.locator("#room").bounding_box()["height"], 100)
        page.emulate_media(forced_colors="active")
        expect(page.locator("#chat .message p").last).to_have_css("border-top-width", "1px")
        page.emulate_media(media="print")
        self.assertGreater(page.evaluate("document.documentElement.scrollHeight"), 1200)

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


class TheReadme(PageTest):  # What it says is so.  `.ci/run` runs its first two commands.
    TEXT = (HERE / "README.md").read_text() if (HERE / "README.md").exists() else ""

    def block(self, language, words):  # the one code block in this language that has these words
        (block,) = [block for block in re.findall(rf"(?ms)^```{language}\n(.*?)^```$", self.TEXT) if words in block]
        return block

    def test_what_it_quotes_and_points_to_is_there(self):
        for command in "python server.py", "python -m unittest":
            self.assertTrue(self.block("sh", f"&& {command}").endswith(f"&& {command}\n"))
        script, page = SCRIPT.read_text(), (HERE / "test.html").read_text()
        self.assertRegex(script, r'\A# /// script\n# requires-python = ">=3.11"\n.*"tornado>=6.6"]\n# ///\n')
        for quoted in "for con in connections", "def flush":
            self.assertTrue(self.block("python", quoted) in script, quoted)
        for line in self.block("js", "new WebSocket").splitlines():
            self.assertTrue(line.strip() in page, line)
        for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)#\"]+)", self.TEXT):
            self.assertTrue("://" in target or (HERE / target).exists(), target)
        for name in re.findall(r"`([A-Za-z_]{4,})`", re.sub("(?s)## Beside.*## Exer", "", self.TEXT)):
            self.assertRegex(script + page, rf"\b{name}\b")

    def test_behind_a_proxy_with_tls_and_under_a_path(self):
        need(shutil.which("caddy"), "Caddy", "install your system's package, on Debian `apt-get install caddy`")
        self.browser()
        site, chat, bob = f"localhost:{Chat.free_port()}", f"localhost:{self.chat.port}", self.guest("Bob")
        block = self.block("caddyfile", "reverse_proxy").replace("localhost:8888", chat)
        (config := pathlib.Path(folder(), "Caddyfile")).write_text(
            "{\nadmin off\nskip_install_trust\nauto_https disable_redirects\n}\n" + block.replace("chat.example.com {",
            f"{site} {{\ntls internal\nhandle_path /chat-app/* {{\nreverse_proxy {chat}\n}}"))
        caddy = self.start(program=["caddy", "run", "--config", config], ready="serving initial configuration",
                           XDG_DATA_HOME=folder(), XDG_CONFIG_HOME=folder())
        for path in "/", "/chat-app/":
            ann = self.window(path, url=f"https://{site}{path}", ignore_https_errors=True)
            bob.until(self.post(ann, f"through the proxy, at {path}"))
            self.assertEqual(ann.evaluate("ws.url"), f"wss://{site}{path}chat")
        caddy.stop(signal.SIGKILL)

    def test_one_room_in_two_processes(self):
        need(shutil.which("redis-server") and importlib.util.find_spec("redis"), "Redis or its package for Python",
             "install your system's package, on Debian `apt-get install redis-server`, and `pip install redis`")
        scale, port = pathlib.Path(folder(), "scale.py"), Chat.free_port()
        scale.write_text(self.block("python", "os, server"))
        self.assertLess(scale.read_text().count("\n"), 40)
        command = f"redis-server --port {port} --bind 127.0.0.1 --appendonly yes --appendfsync always --dir {folder()}"
        start_redis = functools.partial(self.start, ready="Ready to accept connections", program=command.split())
        start = functools.partial(self.start, script=scale, REDIS_URL=f"redis://localhost:{port}", PYTHONPATH=f"{HERE}")
        redis, chats = start_redis(), [start(), start()]
        ann, bob, cleo = guests = [*map(self.guest, ("Ann", "Bob", "Cleo"), (*chats, chats[0]))]
        ann.until("Bob joined")
        for i, message in enumerate(["twice", "twice", *map(str, range(40)), "the end", "the end"]):
            guests[i % 2].say(message, id="twice" if i < 2 else f"{i}")
        said = [[line for line in (*g.until("the end"), *g.until("the end")) if "nick" in line] for g in guests]
        heard = [[line["message"] for line in lines] for lines in said]
        self.assertEqual(sorted(heard[2]), sorted([*map(str, range(40)), "twice", "the end", "the end"]))
        for others in heard[:2]:  # whoever repeats is answered, too
            self.assertEqual(list(dict.fromkeys(others)), list(dict.fromkeys(heard[2])))
        redis.stop(signal.SIGTERM)
        ann.say("wait for Redis")
        redis = start_redis()
        bob.until("wait for Redis")
        for guest in guests:
            guest.vanish()
        self.assertEqual([chat.stop(signal.SIGTERM) for chat in chats], [(0, "")] * 2)
        history = [line for line in self.guest(chat=start()).until("wait for Redis") if "nick" in line]
        self.assertEqual(history[:-1], said[2])  # with the times
        redis.stop(signal.SIGKILL)
