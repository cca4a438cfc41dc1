"""What the chat promises, seen from outside: over HTTP, over sockets, in a browser, in the server's exit and its log.

`python -m unittest` runs all of it.  The classes have the order of server.py's parts; a test's name is its promise.

How a test is written: self.chat is a server process of its own, and self.start(...) starts further ones.  A limit that
a test cannot wait for is made small in that process: CHANGES is Python code for it.  self.guest("Ann") comes in and
joins; self.guest() only comes in.  A guest reads only when it is told to: until a message, or one line, or one list.
A test does not sleep, and does not measure time.  It reads until a thing has happened; after WAIT seconds it fails.
In the end, each server must stop with status 0 and an empty log.  A test that lacks something is skipped, and says
how to get it; `.ci/run` gets everything, and with CI=true nothing is skipped.
"""
import concurrent.futures
import contextlib
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

import server

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
WAIT = 10  # seconds after which something that should come counts as lost
GET = "GET / HTTP/1.0\r\n\r\n"
HANDSHAKE = ("GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
             "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")


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


def frame(data, first=0x81):
    """Return a client's frame (RFC 6455, 5.2), also one that is not allowed.  A mask of zeros changes nothing."""
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    size = bytes([0x80 | len(data)]) if len(data) < 126 else struct.pack("!BH", 0xfe, len(data))
    return bytes([first]) + size + bytes(4) + data


class Chat:
    """A server process on a free port: `python server.py`, or Python code that changes a limit and then runs it."""

    def __init__(self, *options, changes=None, script=HERE / "server.py", port=None, **more):
        self.port = port or free_port()
        code = ["-c", f"import asyncio, server\n{changes}\nasyncio.run(server.main())"] if changes else [script]
        self.process = subprocess.Popen(
            [sys.executable, *code, f"--port={self.port}", *options], text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **{"cwd": HERE, **more})

    @functools.cached_property
    def greeting(self):
        """Its first line, which it prints when it is ready."""
        return self.process.stdout.readline()

    def stop(self, signum=signal.SIGTERM):
        """Stop it, unless a signal was sent already (None); return its exit status and its log, the first time."""
        if self.process.stdout.closed:
            return None
        if signum:
            self.process.send_signal(signum)
        try:
            log = self.process.communicate(timeout=WAIT)[1]
        finally:
            self.process.kill()
        return self.process.returncode, log

    @contextlib.contextmanager
    def frozen(self):
        """Whatever happens meanwhile arrives at the server at one moment."""
        self.process.send_signal(signal.SIGSTOP)
        yield
        self.process.send_signal(signal.SIGCONT)

    def memory(self):
        """Return how many MiB of memory it has, and how many open files."""
        need(sys.platform == "linux", "/proc", "use Linux")
        proc = pathlib.Path(f"/proc/{self.process.pid}")
        return int(re.search(r"VmRSS:\s+(\d+)", (proc / "status").read_text())[1]) >> 10, len(os.listdir(proc / "fd"))


class Guest:
    """Somebody in the chat.  Reads only when told to; the package websockets knows the protocol."""

    def __init__(self, port, nick=None, path="/chat"):
        self.socket, self.events, self.lines, self.status = socket.socket(), [], [], None
        self.socket.settimeout(WAIT)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # little can wait until the guest reads
        self.socket.connect(("127.0.0.1", port))
        self.protocol = ClientProtocol(parse_uri(f"ws://localhost:{port}{path}"), max_size=None)
        self.protocol.send_request(self.protocol.connect())
        self.raw(*self.protocol.data_to_send())
        with contextlib.suppress(ConnectionError):
            self.status = self.event().status_code  # it stays None if the server has hung up
        if nick:
            self.send({"type": "join", "nick": nick})
            self.until(f"{nick} joined")

    def raw(self, *data):
        """Send bytes as they are: as many as TCP takes at once, and none if the server has hung up."""
        with contextlib.suppress(OSError):
            self.socket.send(b"".join(data))

    def send(self, data):  # an object or a text
        self.protocol.send_text((data if isinstance(data, str) else json.dumps(data)).encode())
        self.raw(*self.protocol.data_to_send())

    def say(self, message, nick="Ann", **more):
        self.send(new_message(message, nick, **more))

    def event(self):  # the response to the handshake, then one frame after the other
        while not self.events:
            if not (data := self.socket.recv(1 << 20)):
                raise ConnectionError("the server has hung up")
            self.protocol.receive_data(data)
            self.events += self.protocol.events_received()
            self.raw(*self.protocol.data_to_send())  # it answers pings
        return self.events.pop(0)

    def frame(self):  # the next list of the server, with what is around it
        while (event := self.event()).opcode != 1:
            if event.opcode == 8:
                raise ConnectionError(f"{event}")
        return json.loads(event.data)

    def line(self):  # the next entry of the lists
        end = time.monotonic() + WAIT
        while not self.lines:  # heartbeats are empty lists
            self.lines += self.frame()["data"]
            if time.monotonic() > end:
                raise TimeoutError("nothing but heartbeats")
        return self.lines.pop(0)

    def until(self, message):  # all lines up to the one with this message
        lines = [self.line()]
        while lines[-1]["message"] != message:
            lines.append(self.line())
        return lines

    def said(self, message):  # what people say, up to this message
        return [line["message"] for line in self.until(message) if "nick" in line]

    def vanish(self):  # it resets the connection, as when a machine crashes
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class ChatTest(unittest.TestCase):
    CHANGES = spare = None

    @functools.cached_property
    def chat(self):
        cls = type(self)
        chat = cls.spare or Chat(changes=self.CHANGES)
        cls.spare = Chat(changes=self.CHANGES)  # for the next test: it starts while this one runs
        return self.use(chat)

    @classmethod
    def tearDownClass(cls):
        if cls.spare:
            cls.spare.stop(signal.SIGKILL)

    def start(self, *options, **more):
        return self.use(Chat(*options, **more))

    def use(self, chat):
        """Wait until a server is ready; when the test has ended, it must stop well, unless the test has stopped it."""
        need(os.name == "posix", "a signal that ends a process well", "use Unix")
        self.assertTrue(chat.greeting)
        self.addClassCleanup(lambda: self.assertIn(chat.stop(None), [(0, ""), None]))  # it has had time to stop
        self.addCleanup(chat.process.terminate)
        return chat

    def guest(self, nick=None, chat=None, **more):
        need("ClientProtocol" in globals(), "websockets", "pip install websockets")
        guest = Guest((chat or self.chat).port, nick, **more)
        self.addCleanup(guest.socket.close)
        return guest

    def stranger(self, text, chat=None, host="127.0.0.1"):
        """Open a connection and send this text; return a file with the answer, which ends when the server hangs up."""
        with socket.create_connection((host, (chat or self.chat).port), WAIT) as there:
            there.sendall(text.encode())
            stranger = there.makefile("rwb", 0)
        self.addCleanup(stranger.close)
        return stranger


class Part1TheChat(ChatTest):
    CHANGES = "server.PAUSE = 0"

    def test_a_newcomer_gets_the_history_and_a_message_has_these_fields(self):
        ann = self.guest()
        self.assertEqual(ann.frame(), {"type": "list", "data": [], "online": 1})
        ann.say("hi", id="k3j9x")
        news = ann.frame()
        self.assertEqual(self.guest().frame(), {**news, "online": 2})
        self.assertAlmostEqual(news["data"][0].pop("time"), time.time(), delta=60)
        said = {"type": "message", "id": "k3j9x", "nick": "Ann", "message": "hi"}
        self.assertEqual(news, {"type": "list", "data": [said], "online": 1})

    def test_everybody_hears_each_message_once_in_one_order_also_who_comes_in_meanwhile_and_as_few_texts(self):
        guests, lists, said = [self.guest() for _ in range(30)], [], []
        with concurrent.futures.ThreadPoolExecutor(30) as pool, self.chat.frozen():
            newcomers = [pool.submit(self.guest) for _ in range(30)]
            for i in range(60):
                guests[i % 30].say(f"{i}")
        while len(said) < 60:
            lists.append(guests[0].frame())
            said += [line["message"] for line in lists[-1]["data"]]
        self.assertLess(len(lists), 20)
        self.assertEqual(sorted(said, key=lambda i: int(i) % 30), [f"{i + j}" for i in range(30) for j in (0, 30)])
        for guest in guests[1:] + [newcomer.result() for newcomer in newcomers]:
            heard = {}
            while len(heard) < 60:  # who comes in in that very moment can have a line in the history, and again after it
                line = guest.line()
                heard.setdefault(line["id"], line["message"])
            self.assertEqual(list(heard.values()), said)

    def test_joining_and_leaving_is_told_and_not_kept_and_one_who_is_back_already_does_not_leave(self):
        ann, old = self.guest("Ann"), self.guest("Bob")
        joined, new = ann.frame(), self.guest("Bob")
        old.raw(frame(b"", 0x88))
        self.assertRaises(ConnectionError, old.until, "never said")
        ann.say("Bob is back")
        self.assertEqual([line["message"] for line in ann.until("Bob is back")], ["Bob joined", "Bob is back"])
        new.vanish()
        for news, message, online in (joined, "Bob joined", 2), (ann.frame(), "Bob left", 1):
            self.assertAlmostEqual(news["data"][0].pop("time"), time.time(), delta=60)
            self.assertEqual(news, {"type": "list", "data": [{"type": "notice", "message": message}], "online": online})
        self.assertEqual([line["message"] for line in self.guest().frame()["data"]], ["Bob is back"])

    def test_one_who_joins_has_that_nick_from_then_on_and_the_posts_page_can_chat_without_joining(self):
        ann, page, said = self.guest("Ann"), self.guest(), []
        for guest, more in (ann, {}), (ann, {"nick": "Bob"}), (page, {"nick": "Cleo"}), (page, {"nick": "Cleo"}):
            guest.send({"type": "new_message", "message": "hello", **more})
            said.append(ann.line())
        self.assertEqual([line["nick"] for line in said], ["Ann", "Ann", "Cleo", "Cleo"])
        self.assertEqual(len({line["id"] for line in said}), 4)
        ann.send({"type": "join", "nick": "Bob"})
        self.assertEqual(ann.line()["type"], "error")

    def test_the_history_has_100_messages_and_a_repetition_is_known_for_10000_and_answered_to_its_sender(self):
        self.assertEqual(server.MEMORY, 10_000)
        for memory, others, known in (10_000, 150, True), (130, 129, True), (130, 130, False):
            chat = self.start(changes=f"server.PAUSE = 0; server.MEMORY = {memory}")
            ann, bob, messages = self.guest(chat=chat), self.guest(chat=chat), [f"{i}" for i in range(others)]
            for message in ["once", *messages]:
                ann.say(message, id=f"id of {message}")
            before = bob.until(messages[-1])
            self.assertEqual([said["message"] for said in self.guest(chat=chat).frame()["data"]], messages[-100:])
            bob.say("twice", nick="Bob", id="id of once")
            bob.say("the end")
            self.assertEqual((bob.line() == before[0], "twice" not in ann.said("the end")), (known, known), others)

    def test_a_mistake_shows_a_traceback(self):
        for name in "WSHandler.open", "WSHandler.on_message", "WSHandler.on_close", "MainHandler.get", "broadcast", "flush":
            chat = self.start(changes=f"server.{name} = lambda *args, **kwargs: 1 / 0")
            guest = self.guest(chat=chat)
            guest.raw(frame(new_message("hi")), frame(b"", 0x88))
            self.assertRaises(ConnectionError, guest.until, "never said")
            self.stranger(GET, chat).read()
            self.assertRegex(chat.stop(signal.SIGKILL)[1], "(?s)Traceback.*ZeroDivisionError", name)

    def test_after_a_mistake_in_the_midst_of_flush_the_next_message_is_heard(self):
        chat = self.start(changes="""server.FastWSHandler.write_message = (
    lambda self, text, right=server.FastWSHandler.write_message: right(self, None if "oops" in text else text))""")
        ann = self.guest("Ann", chat)
        ann.say("oops")
        ann.say("once more")
        ann.until("once more")
        self.assertIn("Traceback", chat.stop(signal.SIGKILL)[1])


# What a client may send by mistake or on purpose, and what the answer must match.
BAD = [
    *((bad, "JSON object") for bad in (
        "hello", "", "{", '"text"', "[]", "3", "null", "[" * 8000, '{"a":' * 1300, "9" * 8000, frame(b"\x00\xff", 0x82),
        frame({"type": "join", "nick": "Ann"}, 0x82), {}, {"type": "list"}, {"type": None}, {"type": ["join"]})),
    *(({**sent, "nick": nick}, "nick must") for sent in ({"type": "join"}, new_message("hi")) for nick in (
        None, 3, [], {}, True, "", " \t", "\u2003", "\ud800", "Ann\n", "A\u2028nn", "A\u202enn", "A\u200bnn", "A\ufeff",
        "A\xadnn", "Ann\u3164")),
    *(({"type": kind, "message": "hi"}, "nick must") for kind in ("join", "new_message")),
    *((new_message(message), "message must") for message in (
        None, 7, ["hi"], {"a": 1}, "", " \n ", "\u200b", "\u2060", "\xad", "\ufeff", "\u3164", "\ud800", "\x00")),
    *((new_message("hi", id=id), "id must") for id in (None, 7, "", " ", [], {})),
    ({"type": "join", "nick": "n" * 31}, "nick has 31 .* 30"), (new_message("hi", id="i" * 65), "id has 65 .* 64"),
    (new_message("m" * 1240), "1,240 .* 1,000"), (new_message("m" * 1001, id="k3j9x"), "1,001"),
    (new_message("m\n" * 21), "21 lines"), (new_message("\n" * 999 + "m"), "1,000 lines"),
]
# Messages and nicks that a client may send: the longest, and letters that break naive code.
GOOD = [("😀" * 1000, "😀" * 30), ("😀" * 1000, "😀" * 30), ("m\n" * 20, "Ann"), *((odd, "e\u0301</b>") for odd in (
    "a\x00", "a\u2028\u2029b", "\u202eabc", "</script>", "a\ud800", "\udfff\ud800b", "e\u0301"))]
ABUSES = {
    "reserved bits": frame({}, 0xc1), "unknown opcode": frame({}, 0x83), "bad UTF-8": frame(b"\xff\xfe"),
    "too long": frame(b"x" * 32769), "too long, by its header alone": struct.pack("!BBQ", 0x81, 0xff, 1 << 62),
    "too long, in fragments": frame(b"x", 0x01) + frame(b"x" * 200, 0x00) * 170,
    "a continuation of nothing": frame({}, 0x80), "a message in a message": frame(b"a", 0x01) + frame({}),
    "a control frame in fragments": frame(b"", 0x09), "a long control frame": frame(b"x" * 126, 0x89),
    "a close frame of one byte": frame(b"\x03", 0x88), "no WebSocket at all": b"\x16\x03\x01\x02\x00" * 50,
}


class Part2AmongStrangers(ChatTest):
    CHANGES = "server.PAUSE = 0"

    def test_bad_input_is_answered_in_words_to_its_sender_alone_and_protocol_abuse_closes_that_connection_alone(self):
        ann, bob = self.guest("Ann"), self.guest()
        for bad, words in BAD:
            with self.subTest(str(bad)[:60]):
                (bob.raw if isinstance(bad, bytes) else bob.send)(bad)
                error = bob.line()
                self.assertRegex(error.pop("message"), words)
                id = bad.get("id") if isinstance(bad, dict) else None
                self.assertEqual(error, {"type": "error", "id": id} if isinstance(id, str) else {"type": "error"})
        for abuse, data in ABUSES.items():
            with self.subTest(abuse):
                guest = self.guest()
                guest.raw(data)
                self.assertRaises(ConnectionError, guest.until, "never said")
        bob.say("still here")
        self.assertEqual(ann.line()["message"], "still here")

    def test_what_is_allowed_is_relayed_as_it_is_and_without_unknown_fields(self):
        ann, bob = self.guest(), self.guest()
        for number, (message, nick) in enumerate(GOOD):
            id = f"{number}".rjust(64, "😀")
            sent = new_message(message, nick, id=id, time=0, online=99, data=[1], html="<b>", mine=True)
            ann.send(json.dumps(sent, ensure_ascii=number > 0))
            for said in ann.line(), bob.line():
                self.assertGreater(said.pop("time"), 1e9)
                self.assertEqual(said, {"type": "message", "id": id, "nick": nick, "message": message})

    def test_http_statuses_and_a_log_of_one_line_for_each_request_that_is_refused(self):
        statuses = {"GET /": 200, "GET /?nick=Ann": 200, "GET /chat": 400, "GET /nowhere": 404, "GET /server.py": 404}
        statuses |= {f"{method} /{path}": 405 for method in ("POST", "PUT", "DELETE") for path in ("", "chat")}
        requests = [(f"{request} HTTP/1.0\r\n\r\n", status) for request, status in statuses.items()]
        for origin, status in ("http://a", 101), ("https://evil.example", 403):
            requests.append((HANDSHAKE.replace("Host", f"Origin: {origin}\r\nHost"), status))
        for request, status in [*requests, ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx", 400)]:
            with self.stranger(request) as answer:  # the last one comes before the body has
                self.assertIn(f" {status} ", answer.readline().decode(), request)
        log = [" ".join(line.split()[:3]) for line in self.chat.stop()[1].splitlines()]
        self.assertEqual(log, [f"{status} {sent.split(' HTTP')[0]}" for sent, status in requests if status > 399])

    def test_the_page_carries_its_policy_and_head_gets_the_same_without_the_body(self):
        other, page, head = (self.stranger(sent).read().decode() for sent in (GET, GET, GET.replace("GET", "HEAD")))
        (nonce,) = set(re.findall(r"'nonce-([\w-]+)'", page))
        self.assertNotIn(nonce, other)
        self.assertEqual(page.count(f'nonce="{nonce}"'), len(re.findall("<(?:script|style)", page)))
        for words in "default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", 'value="User':
            self.assertIn(words, page)
        self.assertNotIn("unsafe-", page)
        sizes = [int(re.search(r"Content-Length: (\d+)", answer)[1]) for answer in (page, head)]
        self.assertAlmostEqual(*sizes, delta=2)  # a guest's name has one digit to three
        self.assertRegex(head, r"(?s)^HTTP/1.1 200 .*\r\n\r\n$")

    def test_a_flood_slows_only_the_flooder(self):
        chat = self.start()
        ann, flooder = self.guest("Ann", chat), self.guest("Flooder", chat)
        flooder.raw(*(frame(new_message(f"{i}")) for i in range(2000)))
        flooded = ann.said("4")
        for i in range(20):
            ann.say(f"line {i}")
            flooded += ann.said(f"line {i}")[:-1]
        self.assertLess(len(flooded), 1000)
        self.assertEqual(flooded, [f"{i}" for i in range(len(flooded))])
        chat.stop(signal.SIGKILL)  # else it waits for the flooder's answer to its goodbye

    def test_those_who_vanish_are_noticed_and_memory_and_files_are_free_again(self):
        ann, memory = self.guest("Ann"), []
        for _ in range(100):
            ann.say("😀" * 1000)
            self.stranger(HANDSHAKE).close()  # gone before the handshake is over
        for i in range(4):
            for ghost in [self.guest(f"Ghost {i}") for _ in range(20)]:
                ghost.say("😀" * 1000)
                ghost.vanish()
            ann.until(f"Ghost {i} left")
            memory.append(self.chat.memory())
        self.assertLess(memory[3][0] - memory[1][0], 10)
        self.assertLess(memory[3][1], 30)

    def test_when_files_run_out_newcomers_are_hung_up_on_until_there_is_room_again(self):
        chat = self.start(changes="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))")
        room = [self.guest("Ann", chat)]
        while room[-1].status:
            room.append(self.guest(chat=chat))
        self.assertIn(len(room), range(30, 60))
        self.assertEqual({self.guest(chat=chat).status for _ in range(100)}, {None})
        room[0].say("we talk on")
        room[1].until("we talk on")
        room[2].vanish()
        while not self.guest(chat=chat).status:  # until the server sees that there is room
            pass

    def test_a_request_that_never_ends_is_closed(self):
        chat = self.start(changes="""server.LimitedHTTPServer = (lambda *args, start=server.LimitedHTTPServer, **limits:
    start(*args, **{name: min(limits[name], 0.1) for name in limits}))""")  # 20 seconds are 0.1 here
        for request in "", HANDSHAKE[:-2], "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n":
            self.stranger(request, chat).read()
        self.assertNotIn("Traceback", chat.stop()[1])


class Part3Speed(ChatTest):
    CHANGES = """server.PAUSE, server.PATIENCE, server.LENGTHS["message"] = 0, 1, 60_000
server.application.settings["websocket_max_message_size"] = 70_000"""

    def test_lists_of_the_lengths_where_the_header_of_a_frame_changes(self):
        ann, rest = self.guest(), 0
        ann.frame()
        for length in 0, 125, 126, 65535, 65536:
            ann.send({"type": "join", "id": "i" * (length - rest)})
            error = json.dumps(ann.frame())  # it has the id in it
            rest = rest or len(error)
            self.assertEqual(len(error), length or rest)

    def test_one_who_does_not_read_is_disconnected_although_it_answers_pings_and_one_who_is_slow_is_not(self):
        deaf, slow, ann, lines = self.guest("Deaf"), self.guest(), self.guest("Ann"), []
        while "Deaf left" not in lines:
            self.assertLess(len(lines), 5000)
            for message in ["x" * 60_000] * 70 + [f"{len(lines)}"]:
                ann.say(message)
            slow.until(message)  # it was behind, and is no longer
            lines += [line["message"] for line in ann.until(message)]
            deaf.raw(frame(b"", 0x8a))

    def test_one_who_is_slow_hears_everything_in_order(self):
        slow, ann, said = self.guest(), self.guest("Ann"), [f"{i} " + "x" * 59_000 for i in range(200)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            heard = pool.submit(slow.said, said[-1])
            for message in said:
                ann.say(message)
                ann.until(message)
            self.assertEqual(heard.result(), said)

    def test_one_large_text_disconnects_nobody_who_reads_and_is_in_memory_once(self):
        ann, crowd, memory = self.guest("Ann"), [self.guest() for _ in range(150)], self.chat.memory()
        with self.chat.frozen():
            for guest in crowd[:60]:
                guest.say("x" * 60_000)
        ann.say("the end")
        self.assertEqual(len(ann.said("the end")), 61)
        self.assertLess(self.chat.memory()[0] - memory[0], 40)  # what waits for 150 who do not read would be more

    def test_one_who_answers_no_ping_is_closed(self):
        self.assertEqual(server.application.settings["websocket_ping_interval"], 20)  # here it is less
        chat = self.start(changes="server.application.settings['websocket_ping_interval'] = 0.2")
        silent = self.guest("Silent", chat)
        silent.raw = lambda *data: None
        self.assertRaisesRegex(ConnectionError, "ping timed out", silent.until, "never said")


class Part4HowItStartsAndStops(ChatTest):
    def test_it_serves_this_machine_alone_unless_told_otherwise_from_any_folder_and_says_where(self):
        need(sys.platform == "linux", "127.0.0.2, another address of this machine", "use Linux")
        for options, url, host in (([], "localhost", "localhost"), (["--address="], "localhost", "localhost"),
                                   (["--address=::1"], "[::1]", "::1"), (["--address=0.0.0.0"], "0.0.0.0", "127.0.0.2")):
            chat = self.start(*options, cwd="/")
            self.assertIn(f" http://{url}:{chat.port}/ ", chat.greeting)
            self.assertIn(b"Welcome to ScopyChat", self.stranger(GET, chat, host).read())
            if host != "127.0.0.2":
                self.assertRaises(ConnectionRefusedError, self.stranger, GET, chat, "127.0.0.2")

    def test_wrong_options_get_one_clear_line(self):
        for option in ("--port=x", "--port=99999", "--port=-1", "--port=0", f"--port={self.chat.port}", "--prot=1",
                       "--address=no.invalid", "--address=.."):
            status, log = Chat(option).stop(None)
            self.assertGreater(status, 0, option)
            self.assertRegex(log, rf"\A(usage: .*\n( .*\n)*)?.*({re.escape(option).replace('=', '|')}).*\n\Z")

    def test_its_metadata_names_python_and_tornado(self):
        metadata = '# /// script\n# requires-python = ">=3.11"\n# dependencies = ["tornado>=6.6"]\n# ///\n'  # PEP 723
        self.assertTrue((HERE / "server.py").read_text().startswith(metadata))

    def test_a_heartbeat_every_10_seconds_is_an_empty_list(self):
        self.assertEqual(server.HEARTBEAT, 10)
        ann = self.guest(chat=self.start(changes="server.HEARTBEAT = 0.05"))
        self.assertEqual([ann.frame() for _ in range(3)], [{"type": "list", "data": [], "online": 1}] * 3)

    def test_a_signal_ends_it_when_what_came_is_delivered_with_a_goodbye_to_all_though_a_hundred_flood(self):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(self.ends, [signal.SIGTERM, signal.SIGINT]))

    def ends(self, signum):
        chat = self.start()
        guests, newcomer = [self.guest(f"Ann {i}", chat) for i in range(5)], self.stranger(HANDSHAKE[:-2], chat)
        flooders = [self.guest(chat=chat) for _ in range(100)]
        for flooder in flooders:
            flooder.raw((frame(new_message("flood")) + frame(b"bad")) * 10_000)
        with chat.frozen():
            for guest in guests:
                guest.say("the end")
            chat.process.send_signal(signum)
        for guest in guests:
            for _ in guests:
                guest.until("the end")
            self.assertRaisesRegex(ConnectionError, "1001 .*the server stops", guest.until, "never said")
            if guest is guests[0]:  # a newcomer comes in when the server has said goodbye already
                newcomer.write(HANDSHAKE[-2:].encode())
        self.assertIn(b"\x03\xe9the server stops", newcomer.read())
        for flooder in flooders:
            flooder.vanish()
        self.assertEqual(chat.stop(None), (0, ""))

    def test_parts_3_and_2_can_be_cut_out(self):
        parts = re.split(r"(?m)^# =+\n(?=# Part)", (HERE / "server.py").read_text())
        for cut, handler, http in (3, "PublicWSHandler", "LimitedHTTPServer"), (2, "WSHandler", "httpserver.HTTPServer"):
            script = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "server.py")
            rest = "".join(parts[:cut] + parts[4:]).replace("FastWSHandler)", f"{handler})")
            script.write_text(rest.replace("LimitedHTTPServer(", f"{http}("))
            script.with_name("test.html").write_text((HERE / "test.html").read_text())
            chat = self.start(script=script)
            ann, bob = self.guest("Ann", chat), self.guest("Bob", chat)
            bob.say("hi", "Bob")
            self.assertEqual([line["message"] for line in ann.until("hi")], ["Bob joined", "hi"])
            self.assertEqual(self.guest(chat=chat).said("hi"), ["hi"])
            bob.vanish()
            ann.until("Bob left")


# ---- The page: windows of a real browser ---------------------------------------------------------------------------


class Proxy:
    """The network between the browser and the server.  It can reset connections, refuse new ones, or go dead."""

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
def windows(test=None, **options):
    """Return a context for windows: one for all tests, or one for this test alone, with Playwright's options."""
    context = browser().new_context(**options)
    context.set_default_timeout(WAIT * 1000)
    context.route("https://code.jquery.com/**", lambda route: answer(route, JQUERY.read_bytes()))
    return context


def answer(route, body, content_type="text/javascript"):
    route.fulfill(body=body, content_type=content_type, headers={"Access-Control-Allow-Origin": "*"})


def without(page, first):
    """Return a page's text without the script's part that begins with this heading, and without those after it."""
    before, _, rest = page.partition(f"// ==== {first}")
    end = rest.rindex("});")
    return before + rest[end:]


CONNECTED = "() => jQuery('#status').text() === 'Connected'"
DISCONNECTED = "() => jQuery('#status').text().startsWith('Disconnected')"


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

    def window(self, nick=None, clock=None, change=None, jquery=None, url=None, size=(1000, 600), **options):
        """Return a page, in which this nick has joined.  change is a function of the page's text."""
        page = windows(clock and self.id(), **options).new_page()
        self.addCleanup(page.close)
        if clock:
            page.clock.install(time=clock)
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        if change:
            page.route("**/", lambda route: answer(route, change(route.fetch().text()), "text/html"))
        if jquery:
            page.route("https://code.jquery.com/**", jquery)
        page.goto(url or f"http://localhost:{self.proxy.port}/", wait_until="commit" if jquery else "load")
        if not jquery:
            page.evaluate("new Promise(ready => jQuery(ready))")
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
        return page.locator("#chat .message > p").all_text_contents()

    def runs(self, page, condition, seconds=60):
        """Let the clock of a page run until a condition is true."""
        for _ in range(0, seconds, 3):
            if page.evaluate(condition):
                return
            page.clock.run_for(3000)
            page.wait_for_timeout(20)  # what was sent meanwhile arrives
        raise AssertionError(f"after {seconds} s: {page.locator('main').inner_text()}")

    def at_end(self, page):
        """Return whether the last line of the log is in view."""
        return page.evaluate("""() => jQuery('#chat').last()[0].getBoundingClientRect().bottom
                                      < jQuery('#log')[0].getBoundingClientRect().bottom + 2""")


class ThePageChats(PageTest):
    """Part 1 of the page."""

    CHANGES = "server.HEARTBEAT = 0.2"

    def test_two_windows_talk_and_markup_is_text(self):
        ann = self.window()
        self.assertRegex(ann.get_by_label("Nick").input_value(), r"^User\d+$")
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
            expect(page.locator("#chat img, #chat p b")).to_have_count(0)
            expect(page.get_by_text("2 online")).to_be_visible()
            expect(page.locator("#sending li")).to_have_count(0)
        self.assertRegex(ann.locator("#chat li", has_text="hi Ann").inner_text(), r"<img src=x> \d+:\d\d.*\s+hi Ann")
        bob.close()
        self.shows(ann, "<img src=x> left")
        expect(ann.get_by_text("1 online")).to_be_visible()

    def test_part_1_alone_is_a_chat_and_does_not_lose_what_is_typed_without_a_word(self):
        ann, bob = (self.window(nick, change=lambda page: without(page, "Part 2")) for nick in ("Ann", "Bob"))
        self.post(ann, "hello")
        self.post(bob, "hi Ann")
        for page in ann, bob:
            self.shows(page, "hi Ann")
            self.assertEqual(sorted(self.said(page)), ["hello", "hi Ann"])
        self.proxy.cut()
        self.shows(ann, "chat server disconnected")
        self.post(ann, "are you there?")
        expect(ann.get_by_role("button", name="Post")).to_be_disabled()
        expect(ann.get_by_label("Post as")).to_have_value("are you there?")

    def test_until_jquery_has_come_nobody_can_join_and_the_page_says_why(self):
        held = []
        page = self.window(jquery=lambda route: held.append(route))
        page.get_by_label("Nick").fill("Annabelle")
        page.get_by_label("Nick").press("Enter")
        expect(page.get_by_role("button", name="Join")).to_be_disabled()
        expect(page.get_by_text("waiting for jQuery")).to_be_visible()
        answer(held[0], JQUERY.read_bytes())
        page.get_by_role("button", name="Join").click()
        self.shows(page, "Annabelle joined")
        page.reload(wait_until="commit")
        page.get_by_label("Nick").fill("Bella")
        answer(held[1], JQUERY.read_bytes())
        expect(page.get_by_role("button", name="Join")).to_be_enabled()
        expect(page.get_by_label("Nick")).to_have_value("Bella")  # what was typed wins over what the tab remembers
        for body in b"", JQUERY.read_bytes() + b" ":  # nothing came; not what was asked for, by its integrity
            page = self.window(jquery=functools.partial(answer, body=body))
            expect(page.get_by_text("waiting for jQuery")).to_be_visible()
            expect(page.get_by_role("button", name="Join")).to_be_disabled()
            page.wait_for_load_state()
            self.errors.clear()  # jQuery is not defined

    def test_a_message_that_is_refused_is_not_lost(self):
        ann, bob = self.window("Ann"), self.guest("Bob")
        box = ann.get_by_label("Post as")
        self.post(ann, "x" * 1240)
        expect(ann.locator("#chat .error", has_text="1,240 characters, and 1,000 is the most")).to_be_in_viewport()
        expect(box).to_have_value("x" * 1240)
        expect(ann.locator("#sending li")).to_have_count(0)
        with self.chat.frozen():
            box.press("Enter")
            box.fill("meanwhile")
        expect(box).to_have_value("x" * 1240 + " meanwhile")
        self.post(ann, "short")
        self.assertEqual(bob.said("short"), ["short"])

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


class ThePageLosesNothing(PageTest):
    """Part 2 of the page."""

    CHANGES = "server.PAUSE = 0"

    def test_what_is_posted_while_the_server_is_away_is_said_in_order_when_it_is_back(self):
        ann, bob = (self.window(nick, clock=time.time()) for nick in ("Ann", "Bob"))
        self.post(ann, "before")
        self.shows(bob, "before")
        port = self.chat.port
        self.assertEqual(self.chat.stop(), (0, ""))
        self.shows(ann, "chat server disconnected: the server stops (1001)")
        expect(ann.locator("header")).to_contain_text("Disconnected. Trying again …")
        self.post(ann, "mean<b>while", "and this")
        expect(ann.locator("#sending li")).to_have_text(["mean<b>while", "and this"])
        self.start(port=port)
        self.runs(ann, CONNECTED)
        self.post(ann, "and now")
        for page in ann, bob:
            self.runs(page, "() => jQuery('#chat').text().includes('and now')")
            self.assertEqual(self.said(page), ["before", "mean<b>while", "and this", "and now"])
            expect(page.get_by_text("may be missing")).to_have_count(0)
        history = [line["message"] for line in self.guest().frame()["data"]]
        self.assertEqual(history, ["before", "mean<b>while", "and this", "and now"])  # told again

    def test_a_message_is_told_a_restarted_server_for_a_minute(self):
        ann = self.window("Ann", clock=time.time())
        self.post(ann, "long ago")
        self.shows(ann, "long ago")
        ann.clock.run_for(61_000)
        self.post(ann, "just now")
        self.shows(ann, "just now")
        port = self.chat.port
        self.chat.stop()
        self.start(port=port)
        self.runs(ann, CONNECTED)
        self.post(ann, "the end")
        self.shows(ann, "the end")
        self.assertEqual([line["message"] for line in self.guest().frame()["data"]], ["just now", "the end"])

    def test_a_dead_network_is_noticed_and_given_up_and_when_it_is_back_the_page_is_too(self):
        ann = self.window("Ann", clock=time.time(), change=lambda page: without(page, "Part 3"))
        bob = self.guest("Bob")
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

    def test_missed_messages_are_filled_in_or_owned_up_to(self):
        ann, bob = self.window("Ann", clock=time.time()), self.guest("Bob")
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
            self.runs(ann, CONNECTED)
            self.shows(ann, f"{count}-{count - 1}")
            expect(ann.get_by_text("messages may be missing here")).to_have_count(gap)
        expect(self.window("Cleo").get_by_text("may be missing")).to_have_count(0)  # a newcomer misses nothing
        self.assertEqual(self.said(ann), ["here", *(f"50-{i}" for i in range(50)), *(f"150-{i}" for i in range(50, 150))])

    def test_pages_that_lost_their_server_do_not_all_come_back_at_once(self):
        ann = self.window("Ann", clock=time.time())
        ann.clock.pause_at(time.time() + 5)
        self.proxy.refuses = True
        for chance, pause in (0, 1000), (0.999, 4996):
            ann.evaluate("chance => { Math.random = () => chance; }", chance)
            self.proxy.cut()
            ann.wait_for_function(DISCONNECTED)
            accepted = self.proxy.accepted
            ann.clock.run_for(pause - 100)
            self.assertEqual(self.proxy.accepted, accepted)
            self.proxy.refuses = False
            ann.clock.run_for(200)
            ann.wait_for_function(CONNECTED)

    def test_nothing_is_lost_or_doubled_on_a_network_that_fails_and_a_server_that_restarts(self):
        chance = random.Random(20121203)
        pages = [self.window(nick, change=lambda page: without(page, "Part 3").replace("1000 + 4000 * Math.random()", "200"))
                 for nick in ("Ann", "Bob")]  # they come back soon
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
            expect(page.locator("#chat .message")).to_have_count(len(posted), timeout=WAIT * 1000)
            expect(page.locator("#sending li")).to_have_count(0)
            self.assertEqual(sorted(self.said(page)), sorted(posted))


class ThePageIsGoodToRead(PageTest):
    """Part 3 of the page, and its style sheet."""

    CHANGES = "server.PAUSE = 0"

    def test_names_times_and_scripts(self):
        ann, bob, user50, user51 = self.window("Ann"), *map(self.guest, ("Bob", "User50", "User51"))
        for i, (guest, message) in enumerate([
                (bob, "one"), (bob, "two  spaces\nand a break"), (user50, "fifty"), (user51, "fifty-one"), (bob, "مرحبا Bob!")]):
            guest.say(message)
            expect(ann.locator("#chat .message")).to_have_count(i + 1)
        for i, shown in enumerate([True, False, True]):
            expect(ann.locator("#chat b", has_text="Bob").nth(i)).to_be_visible(visible=shown)  # not twice in a row
        copied = ann.evaluate("getSelection().selectAllChildren(jQuery('#chat')[0]), getSelection().toString()")
        self.assertRegex(copied, r"Bob \d+:\d\d.*\s+one\s+two  spaces\nand a break\s+User50 \d+:\d\d.*\s+fifty\s+User51 \d")
        # The first letter of an Arabic line stands at its right end, in the log and in the box.
        edges = ann.evaluate("""() => {
            const text = jQuery('#chat p:contains(مرحبا)')[0], range = new Range();
            range.setStart(text.firstChild, 0);
            range.setEnd(text.firstChild, 1);
            return [range.getBoundingClientRect().right, text.getBoundingClientRect().right];
        }""")
        self.assertLess(edges[1] - edges[0], 20)
        for field in "#nick", "#message":
            expect(ann.locator(field)).to_have_attribute("dir", "auto")
        year = f"{time.localtime().tm_year}"
        self.assertNotIn(year, ann.locator("#chat").inner_text())
        tomorrow = self.window("Tom", clock=time.time() + 86400)
        expect(tomorrow.locator("#chat time", has_text=year)).to_have_count(5)

    def test_an_address_becomes_a_link_and_ends_where_a_person_would_end_it(self):
        ann, bob, wiki = self.window("Ann"), self.guest("Bob"), "https://en.wikipedia.org/wiki/Blur_(band)"
        cases = {  # what is said: the addresses in it
            f"{wiki} ({wiki}), [{wiki}]. {wiki}!": [wiki] * 4,
            "http://a.example/?b=c&d=%20#e; (https://b.example/d.) or HTTPS://C.EXAMPLE:80?":
                ["http://a.example/?b=c&d=%20#e", "https://b.example/d", "HTTPS://C.EXAMPLE:80"],
            "https://a.example,https://b.example/1,2": ["https://a.example", "https://b.example/1,2"],
            "“https://a.example/x” «https://b.example» 'https://c.example' 看https://d.example/路。好，https://e.example…":
                ["https://a.example/x", "https://b.example", "https://c.example", "https://d.example/路", "https://e.example"],
            "https://a.example/\u202egpj.exe https://b.example\u200b/c https://c.example/\u3164d":
                ["https://a.example/", "https://b.example", "https://c.example/"],
            "*https://a.example* <https://b.example> `https://c.example`":
                ["https://a.example", "https://b.example", "https://c.example"],
            "not javascript:alert(1), ftp://d or https://": [],
        }
        for said, addresses in cases.items():
            bob.say(said)
            line = ann.locator("#chat .message", has_text=said).last
            line.wait_for()
            links = line.locator("a")
            self.assertEqual([link.get_attribute("href") for link in links.all()], addresses)
            self.assertEqual([link.text_content() for link in links.all()], addresses)
            self.assertEqual(line.locator("p").text_content(), said)
            for link in links.all():
                self.assertEqual([link.get_attribute(name) for name in ("rel", "target")], ["noreferrer", "_blank"])

    def test_own_messages_stand_apart_and_a_reload_knows_them_and_the_nick(self):
        page = self.window()
        page.keyboard.type("Ann\nhi\n")  # everything by keyboard
        self.shows(page, "hi")
        self.guest("Bob").say("hi Ann")
        self.shows(page, "hi Ann")
        page.get_by_label("Post as").fill("by a click")
        page.get_by_role("button", name="Post").click()
        self.shows(page, "by a click")
        page.keyboard.type("and the caret is there\n")
        self.shows(page, "the caret is there")
        page.keyboard.press("Shift+Tab")
        expect(page.get_by_role("region", name="Conversation")).to_be_focused()  # the arrow keys scroll it
        page.reload()
        expect(page.get_by_label("Nick")).to_have_value("Ann")
        page.get_by_role("button", name="Join").click()
        self.shows(page, "the caret is there")
        own = "p => { const box = p.getBoundingClientRect(); return box.left + box.right > innerWidth; }"
        self.assertEqual([line.evaluate(own) for line in page.locator("#chat .message > p").all()], [True, False, True, True])
        expect(self.window().get_by_label("Nick")).not_to_have_value("Ann")

    def test_the_end_stays_in_view_at_any_zoom_and_a_reader_gets_away_from_it_and_back(self):
        bob = self.guest("Bob")
        pages = [self.window(f"At {zoom}", device_scale_factor=zoom, size=(900, 500)) for zoom in (0.67, 0.9, 1.1)]
        ann = self.window("Ann", size=(800, 500))
        for i in range(60):
            bob.say(f"line {i}." + " and more" * (i % 31))
        for page in *pages, ann:
            expect(page.locator("#chat li", has_text="line 59.")).to_be_in_viewport(ratio=1)
            self.assertTrue(self.at_end(page))
        newest = ann.get_by_role("button", name="↓")
        ann.locator("#log").hover()
        ann.mouse.wheel(0, -900)
        expect(newest).to_have_text("Newest ↓")
        place = ann.locator("#chat li", has_text="line 45.")
        top = place.bounding_box()["y"]
        for i in range(60, 66):  # the room talks on
            bob.say(f"line {i}.")
        expect(newest).to_have_text("6 new ↓")
        self.assertAlmostEqual(place.bounding_box()["y"], top, delta=3)
        newest.click()
        expect(newest).to_be_hidden()
        self.assertTrue(self.at_end(ann))
        ann.keyboard.type("the caret is in the box\n")
        self.shows(ann, "the caret is in the box")
        ann.evaluate("jQuery('#log').prop('scrollTop', -500)")
        newest.press("Enter")
        expect(ann.get_by_label("Post as")).to_be_focused()
        ann.evaluate("jQuery('#log').prop('scrollTop', -500)")
        expect(newest).to_be_visible()
        self.post(ann, "whoever posts wants to see it")
        last = ann.locator("#chat li", has_text="wants to see it")
        expect(last).to_be_in_viewport(ratio=1)
        ann.set_viewport_size({"width": 800, "height": 250})  # a keyboard comes up
        expect(last).to_be_in_viewport(ratio=1)

    def test_a_page_keeps_500_messages_and_many_who_come_and_go_do_not_push_them_out(self):
        ann = self.window("Ann")
        ann.evaluate("""() => {
            const data = [];
            for (let i = 0; i < 600; i++) {
                data.push({type: 'message', id: 'x' + i, nick: 'Bob', message: 'line ' + i, time: Date.now() / 1000});
                data.push({type: 'notice', message: 'Visitor ' + i + ' joined', time: Date.now() / 1000});
            }
            ws.onmessage({data: JSON.stringify({type: 'list', data, online: 77})});
        }""")
        self.assertEqual(self.said(ann), [f"line {i}" for i in range(100, 600)])
        self.assertTrue(10 < ann.locator("#chat .notice").count() < 100)
        self.assertTrue(self.at_end(ann))
        expect(ann.get_by_text("77 online")).to_be_visible()

    def test_a_hidden_tab_counts_in_its_title(self):
        ann, bob = self.window("Ann"), self.guest("Bob")
        ann.evaluate("""() => {
            Object.defineProperty(document, 'hidden', {value: true, configurable: true});
            document.dispatchEvent(new Event('visibilitychange'));
        }""")
        for i in range(8):
            bob.say(f"line {i}")
        self.post(ann, "my own")
        self.shows(ann, "my own")
        ann.wait_for_function("() => document.title === '(8) ScopyChat'")
        ann.evaluate("delete document.hidden, document.dispatchEvent(new Event('visibilitychange'))")
        self.assertEqual(ann.title(), "ScopyChat")

    def test_with_a_screen_reader(self):
        bob = self.guest("Bob")
        for i in range(30):
            bob.say(f"history {i}")
        bob.until("history 29")
        ann = self.window(clock=time.time())
        ann.evaluate("""() => {
            const log = document.querySelector('#chat');
            window.read = [];
            new MutationObserver(records => records.forEach(record => record.addedNodes.forEach(
                node => log.ariaLive === 'off' || window.read.push(node.textContent)))).observe(log, {childList: true, subtree: true});
            window.states = [];
            new MutationObserver(() => window.states.push(jQuery('[role=status]').text())).observe(
                document.querySelector('[role=status]'), {childList: true, subtree: true, characterData: true});
        }""")
        self.join(ann, "Ann")
        self.shows(ann, "history 29")
        self.runs(ann, "() => document.querySelector('#chat').ariaLive === 'polite'")
        self.post(ann, "my own line")
        self.shows(ann, "my own line")
        read = ann.evaluate("window.read")
        self.assertFalse([text for text in read if "history" in text])
        self.assertEqual(len([text for text in read if "my own line" in text]), 1)
        self.proxy.refuses = True
        self.proxy.cut()
        ann.wait_for_function(DISCONNECTED)
        accepted = self.proxy.accepted
        while self.proxy.accepted < accepted + 2:  # attempts that fail are not told each time
            ann.clock.run_for(1000)
        self.assertEqual(ann.evaluate("window.states"), ["Connecting …", "Connected", "Disconnected."])

    def test_on_small_and_odd_screens_and_paper_and_axe_finds_nothing(self):
        page = self.window(size=(320, 568), bypass_csp=True)  # for axe, which is a script
        page.add_script_tag(path=AXE)

        def check():
            for scheme in "light", "dark":
                page.emulate_media(color_scheme=scheme)
                self.assertEqual(page.evaluate("async () => (await axe.run()).violations.map("
                                               "v => v.id + ': ' + v.nodes.map(n => n.html).join())"), [])

        check()
        title = page.get_by_role("heading").evaluate("h => [h.scrollWidth, h.clientWidth]")
        self.assertLessEqual(*title)
        self.join(page, "W" * 30)
        self.guest("Bot").say("W" * 99)
        page.evaluate("ws.send('bad')")
        expect(page.locator("#chat li.error")).to_be_in_viewport()
        for i in range(30):
            self.guest(f"User{i}").say("the last line")
        expect(page.locator("#chat b")).to_have_count(31)
        page.emulate_media(media="print")
        self.assertGreater(page.evaluate("document.documentElement.scrollHeight"), 1200)
        page.emulate_media(media="screen")
        check()
        self.proxy.refuses = True
        self.proxy.cut()
        self.post(page, "on its way")
        check()
        page.emulate_media(forced_colors="active")
        self.assertNotIn(page.get_by_role("button", name="Post").evaluate("b => getComputedStyle(b).border"), ["0px", "none"])
        for width, height, lines in (320, 568, 5), (320, 256, 1), (740, 180, 1):  # 256: a desktop's window at 400 %
            page.set_viewport_size({"width": width, "height": height})
            self.assertLessEqual(page.evaluate("document.documentElement.scrollWidth"), width)
            self.assertEqual(page.evaluate("document.documentElement.scrollHeight"), height)
            for part in (page.get_by_label("Post as"), page.get_by_role("button", name="Post"), page.get_by_text("on its way"),
                         page.get_by_text("Trying again")):
                expect(part).to_be_in_viewport(ratio=1)
            seen = page.locator("#log li p").evaluate_all("""texts => texts.filter(text => {
                const box = text.getBoundingClientRect(), middle = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
                return text.contains(document.elementFromPoint(...middle)); }).length""")
            self.assertGreaterEqual(seen, lines, (width, height))

    def test_it_asks_before_a_window_with_a_draft_or_an_unsent_message_closes(self):
        ann, asked = self.window("Ann", clock=time.time()), []
        ann.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
        for post in self.post, lambda page, text: page.get_by_label("Post as").fill(text):
            self.proxy.refuses = True
            self.proxy.cut()
            post(ann, "wait for me")
            ann.close(run_before_unload=True)
            ann.wait_for_timeout(200)
            self.assertEqual((asked, ann.is_closed()), (["beforeunload"], False))
            asked.clear()
            self.proxy.refuses = False
            self.runs(ann, CONNECTED)
            self.shows(ann, "wait for me")
        ann.get_by_label("Post as").fill("")
        with ann.expect_event("close"):
            ann.close(run_before_unload=True)
        self.assertEqual(asked, [])


# ---- The README ----------------------------------------------------------------------------------------------------


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

    def test_its_commands_and_what_it_points_to_and_quotes_are_there(self):
        for command in "python server.py", "python -m unittest":
            self.assertTrue(self.block("sh", f"&& {command}").strip().endswith(f"&& {command}"))
        script, page = (HERE / "server.py").read_text(), (HERE / "test.html").read_text()
        for line in self.block("python", "def flush").splitlines():
            self.assertIn(line.strip(), script)
        for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)#\"]+)", self.TEXT):
            self.assertTrue("://" in target or (HERE / target).exists(), target)
        for name in re.findall(r"`([A-Za-z_]{4,})`", self.TEXT.partition("## Beside")[0] + self.TEXT.partition("## Exer")[2]):
            self.assertRegex(script + page, rf"\b{name}\b")

    def test_the_mended_loop_of_the_post_is_a_chat(self):
        need(ClientProtocol, "websockets", "pip install websockets")
        loop = self.block("python", "con.write_message(data)").replace("websocket.", "server.websocket.")
        chat = self.start(changes=f"connections = server.connections\n{loop}\nserver.application.add_handlers("
                                  f"'.*', [('/loop', WSHandler)])")
        ann, bob = self.guest(chat=chat, path="/loop"), self.guest(chat=chat, path="/loop")
        ann.say("hi")
        for guest in ann, bob:
            self.assertEqual(guest.frame(), new_message("hi"))

    def test_behind_a_proxy_with_tls_and_under_a_path(self):
        need(shutil.which("caddy"), "Caddy", "install your system's package, on Debian `apt-get install caddy`")
        super().setUp()
        port = free_port()
        config = self.block("caddyfile", "reverse_proxy").replace("chat.example.com", f"localhost:{port}")
        config = config.replace("8888", str(self.chat.port)).replace("{", "{\n\ttls internal", 1)
        config = config.replace("\treverse_proxy", f"\thandle_path /chat-app/* {{\n\t\treverse_proxy localhost:{self.chat.port}\n\t}}\n"
                                                   "\treverse_proxy", 1)
        (self.folder / "Caddyfile").write_text(
            "{\n\tadmin off\n\tskip_install_trust\n\tauto_https disable_redirects\n}\n" + config)
        self.spawn("caddy", "run", "--config", self.folder / "Caddyfile", port=port,
                   env={**os.environ, "XDG_DATA_HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder)})
        bob = self.guest("Bob")
        for path in "", "chat-app/":
            ann = self.window("Ann", url=f"https://localhost:{port}/{path}", ignore_https_errors=True)
            self.post(ann, f"through the proxy, at /{path}")
            bob.until(f"through the proxy, at /{path}")
            self.assertEqual(ann.evaluate("ws.url"), f"wss://localhost:{port}/{path}chat")

    def test_one_room_in_two_processes(self):
        need(ClientProtocol, "websockets", "pip install websockets")
        need(shutil.which("redis-server"), "Redis", "install your system's package, on Debian `apt-get install redis-server`")
        need(importlib.util.find_spec("redis"), "redis for Python", "pip install redis")
        recipe, port = self.block("python", "import server"), free_port()
        self.assertLess(len(recipe.splitlines()), 40)
        (self.folder / "scale.py").write_text(recipe)

        def start_redis():
            return self.spawn("redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes",
                              "--appendfsync", "always", port=port, cwd=self.folder)

        def start(count):
            env = {**os.environ, "REDIS_URL": f"redis://localhost:{port}", "PYTHONPATH": str(HERE)}
            return [self.use(chat) for chat in [Chat(script=self.folder / "scale.py", env=env) for _ in range(count)]]

        redis, chats = start_redis(), start(2)
        ann, bob = (self.guest(nick, chat) for nick, chat in zip(("Ann", "Bob"), chats, strict=True))
        ann.until("Bob joined")
        for i in range(20):
            ann.say(f"a{i}", id=f"a{i}")
            bob.say(f"b{i}", id=f"b{i}")
        for guest in ann, bob:
            guest.say("twice", id="twice")
        ann.say("the end")
        said, heard = (list(dict.fromkeys(guest.said("the end"))) for guest in (ann, bob))  # a repetition is answered
        self.assertEqual(heard[-len(said):], said)
        self.assertEqual(sorted(said), sorted([f"{who}{i}" for who in "ab" for i in range(20)] + ["twice", "the end"]))

        redis.terminate()
        redis.wait()
        ann.say("wait for Redis")
        start_redis()
        bob.until("wait for Redis")
        for guest, chat in zip((ann, bob), chats, strict=True):
            guest.vanish()
            self.assertEqual(chat.stop(), (0, ""))
        (chat,), history = start(1), []
        while history != [*said, "wait for Redis"]:  # it is still reading the stream
            newcomer = self.guest(chat=chat)
            history = [line["message"] for line in newcomer.frame()["data"]]
            newcomer.vanish()
        self.assertEqual(chat.stop(), (0, ""))


if __name__ == "__main__":
    unittest.main()
