"""What the chat promises, seen from outside: over HTTP, over sockets, in a browser, in the server's exit and its log.

The classes have the order of server.py's parts; a test's name is its promise.  self.chat is a server process of its
own, and self.start(...) starts further ones.  A limit that a test cannot wait for is made small there: CHANGES is
Python code for it.  self.guest("Ann") comes in and joins; self.guest() only comes in.  A guest reads only when it is
told to: until a message, or one line, or one list.  A test does not sleep, and measures no time.  It reads until a
thing has happened; after WAIT seconds it fails.  In the end, each server must stop with status 0 and an empty log.
A test that lacks something is skipped, and says how to get it; `.ci/run` gets everything, and skips nothing.
"""
import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest

import server

with contextlib.suppress(ImportError):
    from websockets.client import ClientProtocol
    from websockets.uri import parse_uri
with contextlib.suppress(ImportError):
    from playwright.sync_api import expect, sync_playwright

HERE = pathlib.Path(__file__).resolve().parent
JQUERY = HERE / ".ci/node_modules/jquery/dist/jquery.min.js"
AXE = HERE / ".ci/node_modules/axe-core/axe.min.js"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
WAIT = 8  # seconds after which something that should come counts as lost; after 10, a heartbeat comes
GET = "GET / HTTP/1.0\r\n\r\n"
HANDSHAKE = ("GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
             "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")


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
    """A server process on a free port: `python server.py`, or Python code that changes a limit and then runs it."""

    def __init__(self, *options, changes=None, script=HERE / "server.py", port=None, **more):
        self.port = port or free_port()
        code = ["-c", f"import asyncio, server\n{changes}\nasyncio.run(server.main())"] if changes else [script]
        self.process = subprocess.Popen(
            [sys.executable, *code, f"--port={self.port}", *options], text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **{"cwd": HERE, **more})
        self.greeting = self.process.stdout.readline()  # now it is ready

    def stop(self, signum=signal.SIGTERM):
        """Stop it, unless a signal was sent already (0); return its exit status and its log, the first time."""
        if self.process.stdout.closed:
            return None
        self.process.send_signal(signum)
        try:
            log = self.process.communicate(timeout=WAIT)[1]
        finally:
            self.process.kill()
        return self.process.returncode, log

    @contextlib.contextmanager
    def frozen(self):  # whatever happens meanwhile arrives at the server at one moment
        self.process.send_signal(signal.SIGSTOP)
        yield
        self.process.send_signal(signal.SIGCONT)

    def memory(self):  # how many MiB it has, and how many open files
        need(sys.platform == "linux", "/proc", "use Linux")
        proc = pathlib.Path(f"/proc/{self.process.pid}")
        return int(re.search(r"VmRSS:\s+(\d+)", (proc / "status").read_text())[1]) >> 10, len(os.listdir(proc / "fd"))


class Guest:
    """Somebody in the chat.  Reads only when told to; the package websockets knows the protocol."""

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
            self.status = self.event().status_code  # it stays None if the server has hung up
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
        while not self.lines:
            self.lines += self.frame()["data"]
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
    @functools.cached_property
    def chat(self):
        return self.start(changes=getattr(self, "CHANGES", None))

    @functools.cached_property
    def folder(self):
        return pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def start(self, *options, **more):  # a server; when the test ends, it must end well, or have been stopped already
        chat = Chat(*options, **more)
        self.addClassCleanup(lambda: self.assertIn(chat.stop(0), [(0, ""), None]))  # it has had time to stop
        self.addCleanup(chat.process.terminate)
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


class Part1TheChat(ChatTest):
    def test_a_message_has_these_fields_a_newcomer_gets_it_and_the_posts_page_can_chat_without_joining(self):
        page = self.guest()
        self.assertEqual(page.frame(), {"type": "list", "data": [], "online": 1})
        ann, said = self.guest("Ann"), []
        for guest, more in (ann, {"id": "k3j9x"}), (ann, {"nick": "Bob"}), *[(page, {"nick": "Cleo"})] * 2:
            guest.send({"type": "new_message", "message": "hi", **more})
            said.append(ann.line())
        self.assertEqual(self.guest().frame(), {"type": "list", "data": said, "online": 3})
        self.assertEqual(len({line.pop("id") for line in said} | {"k3j9x"}), 4)
        self.assertAlmostEqual([line.pop("time") for line in said][-1], time.time(), delta=60)
        self.assertEqual(said, [{"type": "message", "nick": n, "message": "hi"} for n in ["Ann"] * 2 + ["Cleo"] * 2])
        ann.send({"type": "join", "nick": "Bob"})  # it speaks under the nick that it joined with, and joins once
        self.assertEqual(ann.line()["type"], "error")

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
            heard = {}  # who comes in at that very moment can get a message in the history and after it
            while len(heard) < 60:
                heard |= {line["id"]: line["message"] for line in [guest.line()]}
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

    def test_the_history_has_100_messages_and_a_repetition_is_known_for_10000_and_answered_to_its_sender(self):
        for memory, others, known in (10_000, 150, True), (130, 129, True), (130, 130, False):
            chat = self.start(changes=f"server.PAUSE = 0; assert server.MEMORY == 10_000; server.MEMORY = {memory}")
            ann, bob, messages = self.guest(chat=chat), self.guest(chat=chat), [f"{i}" for i in range(others)]
            for message in ["once", *messages]:
                ann.say(message, id=f"id of {message}")
            once = bob.until(messages[-1])[0]
            self.assertEqual([said["message"] for said in self.guest(chat=chat).frame()["data"]], messages[-100:])
            bob.say("twice", nick="Bob", id="id of once")
            self.assertEqual(bob.line() == once, known, others)
            bob.say("the end")
            self.assertEqual(ann.said("the end"), ["once", *messages, *["twice"][known:], "the end"])

    def test_a_mistake_shows_a_traceback(self):
        for at in "WSHandler.open WSHandler.on_message WSHandler.on_close MainHandler.get broadcast flush".split():
            chat = self.start(changes=f"server.{at} = lambda *args, **kwargs: 1 / 0")
            guest = self.guest(chat=chat)
            guest.raw(frame(new_message("hi")), frame(b"", 0x88))
            self.assertRaises(ConnectionError, guest.until, "never said")
            self.stranger(GET, chat).read()
            self.assertRegex(chat.stop(signal.SIGKILL)[1], "(?s)Traceback.*ZeroDivisionError", at)

    def test_after_a_mistake_in_the_midst_of_flush_the_next_message_is_heard(self):
        chat = self.start(changes="server.json.dumps = lambda x, f=server.json.dumps: f({1} if 'oh' in str(x) else x)")
        ann = self.guest("Ann", chat)
        ann.raw(frame(new_message("oh")), frame(new_message("once more")))
        ann.until("once more")
        self.assertIn("Traceback", chat.stop(signal.SIGKILL)[1])


# What a client may send by mistake or on purpose, and what the answer must match.
BAD = [
    *((bad, "JSON object") for bad in (
        "hello", "", "{", '"text"', "[]", "3", "null", "[" * 8000, '{"a":' * 1300, "9" * 8000, frame(b"\x00\xff", 0x82),
        frame({"type": "join", "nick": "Ann"}, 0x82), {}, {"type": "list"}, {"type": None}, {"type": ["join"]})),
    *(({**sent, "nick": nick}, "nick must") for sent in ({"type": "join"}, new_message("hi")) for nick in (
        None, 3, "", " \t", "\ud800", "A\n", "A ", *(f"{c}A" for c in "\U000e0100\u202e\u200b\ufeff\xad\u3164\ufe00"))),
    *(({"type": kind, "message": "hi"}, "nick must") for kind in ("join", "new_message")),
    *((new_message(message), "message must") for message in (
        None, 7, ["hi"], {"a": 1}, "", " \n ", "\u200b", "\u2060", "\xad", "\ufeff", "\u3164", "\ud800", "\x00")),
    *((new_message("hi", id=id), "id must") for id in (None, 7, "", " ", [], {})),
    ({"type": "join", "nick": "n" * 31}, "nick has 31 .* 30"), (new_message("hi", id="i" * 65), "id has 65 .* 64"),
    (new_message("m" * 1240), "1,240 .* 1,000"), (new_message("m" * 1001, id="k3j9x"), "1,001"),
    (new_message("m\n" * 21), "21 lines"), (new_message("\n" * 999 + "m"), "1,000 lines"),
]
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
        ann, bob, longest = self.guest(), self.guest(), ("😀" * 1000, "😀" * 30)
        odd = "a\x00", "a\u2028\u2029b", "\u202eabc", "</script>", "a\ud800", "\udfff\ud800b", "e\u0301", "\U0001faff"
        for i, (message, nick) in enumerate([longest, longest, ("m\n" * 20, "<b> 🩷"), *((m, "e\u0301") for m in odd)]):
            sent = new_message(message, nick, id=f"{i}".rjust(64, "😀"), time=0, online=99, data=[1], html="<b>")
            ann.send(json.dumps(sent, ensure_ascii=i > 0))
            for said in ann.line(), bob.line():
                self.assertGreater(said.pop("time"), 1e9)
                self.assertEqual(said, {"type": "message", "id": sent["id"], "nick": nick, "message": message})

    def test_http_statuses_and_a_log_of_one_line_for_each_request_that_is_refused(self):
        statuses = {"GET /": 200, "GET /?nick=Ann": 200, "GET /chat": 400, "GET /nowhere": 404, "GET /server.py": 404}
        statuses |= {f"{method} /{path}": 405 for method in ("POST", "PUT", "DELETE") for path in ("", "chat")}
        requests = [(f"{request} HTTP/1.0\r\n\r\n", status) for request, status in statuses.items()]
        requests += [(f"{HANDSHAKE[:-2]}Origin: http://{a}\r\n\r\n", s) for a, s in (("a", 101), ("b", 403))]
        for request, status in [*requests, ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx", 400)]:
            with self.stranger(request) as answer:  # the last one comes before the body has
                self.assertIn(f" {status} ", answer.readline().decode(), request)
        log = [" ".join(line.split()[:3]) for line in self.chat.stop()[1].splitlines()]
        self.assertEqual(log, [f"{status} {sent.split(' HTTP')[0]}" for sent, status in requests if status > 399])

    def test_the_page_carries_its_policy_and_head_gets_the_same_without_the_body(self):
        other, page, head = (self.stranger(sent).read().decode() for sent in (GET, GET, GET.replace("GET", "HEAD")))
        (nonce,) = set(re.findall(r"'nonce-([\w-]+)'", page))
        self.assertEqual(page.count(f'nonce="{nonce}"'), len(re.findall("<(?:script|style)", page)))
        for words in "default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", 'value="User':
            self.assertIn(words, page)
        self.assertNotRegex(other, f"{nonce}|unsafe-")
        sizes = [int(re.search(r"Content-Length: (\d+)", answer)[1]) for answer in (page, head)]
        self.assertAlmostEqual(*sizes, delta=2)  # a guest's name has one digit to three
        self.assertRegex(head, r"(?s)^HTTP/1.1 200 .*\r\n\r\n$")

    def test_a_flood_slows_only_the_flooder(self):
        chat = self.start()
        ann, flooder = self.guest("Ann", chat), self.guest("Flooder", chat)
        flooder.raw(*(frame(new_message(f"{i}")) for i in range(2000)))
        flooded = ann.said("4")
        for i in range(10):
            ann.say(f"line {i}")
            flooded += ann.said(f"line {i}")[:-1]
        self.assertEqual(flooded, [f"{i}" for i in range(min(len(flooded), 1000))])
        chat.stop(signal.SIGKILL)  # it would wait for the flooder's answer to its goodbye

    def test_those_who_vanish_are_noticed_and_memory_and_files_are_free_again(self):
        ann, memory = self.guest("Ann"), []
        for _ in range(100):
            ann.say("x" * 1000)
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
    start(*args, **{name: min(limits[name], 0.05) for name in limits}))""")  # 20 seconds are 0.05 here
        for request in "", HANDSHAKE[:-2], "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n":
            self.stranger(request, chat).read()


class Part3Speed(ChatTest):
    CHANGES = """server.PAUSE, server.PATIENCE, server.LENGTHS["message"] = 0, 0.5, 60_000
server.application.settings.update(websocket_max_message_size=70_000, websocket_ping_interval=0.2)"""

    def test_lists_of_the_lengths_where_the_header_of_a_frame_changes(self):
        ann = self.guest()
        ann.frame()
        ann.send({"type": "join", "id": ""})
        rest = len(json.dumps(ann.frame()))  # the error without an id
        for length in 125, 126, 65535, 65536:
            ann.send({"type": "join", "id": "i" * (length - rest)})
            self.assertEqual(len(json.dumps(ann.frame())), length)

    def test_one_who_does_not_read_is_disconnected_although_it_answers_pings_and_one_who_is_slow_is_not(self):
        deaf, slow, ann, lines = self.guest("Deaf"), self.guest(), self.guest("Ann"), []
        while "Deaf left" not in lines[:-71]:  # once more after that
            self.assertLess(len(lines), 5000)
            for message in (burst := ["x" * 60_000] * 70 + [f"{len(lines)}"]):
                ann.say(message)
            lines += [line["message"] for line in ann.until(message)]
            self.assertEqual(slow.said(message), burst)  # it was behind, and is no longer
            deaf.raw(frame(b"", 0x8a))

    def test_one_large_text_disconnects_nobody_who_reads_and_is_in_memory_once(self):
        ann, crowd, memory = self.guest("Ann"), [self.guest() for _ in range(60)], self.chat.memory()
        with self.chat.frozen():
            for guest in crowd:
                guest.say("x" * 60_000)
        ann.say("the end")
        self.assertEqual(len(ann.said("the end")), 61)
        self.assertLess(self.chat.memory()[0] - memory[0], 35)  # MiB; 60 times what waits would be more


class Part4HowItStartsAndStops(ChatTest):
    def test_it_serves_this_machine_alone_unless_told_otherwise_from_any_folder_and_says_where(self):
        need(sys.platform == "linux", "127.0.0.2, another address of this machine", "use Linux")
        for options, at, host in (([], "localhost", "localhost"), (["--address="], "localhost", "localhost"),
                                  (["--address=::1"], "[::1]", "::1"), (["--address=0.0.0.0"], "0.0.0.0", "127.0.0.2")):
            chat = self.start(*options, cwd="/")
            self.assertIn(f" http://{at}:{chat.port}/ ", chat.greeting)
            self.assertIn(b"Welcome to ScopyChat", self.stranger(GET, chat, host).read())
            if host != "127.0.0.2":
                self.assertRaises(ConnectionRefusedError, self.stranger, GET, chat, "127.0.0.2")

    def test_wrong_options_get_one_clear_line(self):
        for option in ("--port=x", "--port=99999", "--port=-1", "--port=0", f"--port={self.chat.port}", "--prot=1",
                       "--address=no.invalid", "--address=.."):
            ended, words = "{} {}".format(*Chat(option).stop(0)), re.escape(option).replace("=", "|")
            self.assertRegex(ended, rf"\A[12] (usage: .*\n( .*\n)*)?.*({words}).*\n\Z")

    def test_a_heartbeat_every_10_seconds_is_an_empty_list_and_one_who_answers_no_ping_for_20_is_closed(self):
        self.assertEqual((server.HEARTBEAT, server.application.settings["websocket_ping_interval"]), (10, 20))
        changes = "server.HEARTBEAT = 0.03; server.application.settings['websocket_ping_interval'] = 0.1"
        silent = self.guest(chat=self.start(changes=changes))
        silent.raw = lambda *data: None
        self.assertEqual([silent.frame() for _ in range(3)], [{"type": "list", "data": [], "online": 1}] * 3)
        self.assertRaisesRegex(ConnectionError, "ping timed out", silent.until, "never said")

    def test_a_signal_ends_it_when_what_came_is_delivered_with_a_goodbye_to_all_though_a_hundred_flood(self):
        with concurrent.futures.ThreadPoolExecutor() as pool:  # as soon as it says that it is open
            at_once = pool.map(lambda signum: Chat().stop(signum), [signal.SIGINT, signal.SIGTERM] * 2)
            self.assertEqual([*at_once], [(0, "")] * 4)
        guests, newcomer = [self.guest(f"Ann {i}") for i in range(5)], self.stranger(HANDSHAKE[:-2])
        for _ in range(100):
            self.guest().raw((frame(new_message("flood")) + frame(b"bad")) * 1000)
        with self.chat.frozen():
            for guest in guests:
                guest.say("the end")
            self.chat.process.send_signal(signal.SIGTERM)
        for guest in guests:
            for _ in guests:
                guest.until("the end")
            self.assertRaisesRegex(ConnectionError, "1001 .*the server stops", guest.until, "never said")
        newcomer.write(HANDSHAKE[-2:].encode())  # it comes in when the server has said goodbye to the others
        self.assertIn(b"\x03\xe9the server stops", newcomer.read())
        self.assertEqual(self.chat.stop(0), (0, ""))

    def test_parts_3_and_2_can_be_cut_out(self):
        parts = re.split(r"(?m)^# =+\n(?=# Part)", (HERE / "server.py").read_text())
        for cut, client, http in (3, "PublicWSHandler", "LimitedHTTPServer"), (2, "WSHandler", "httpserver.HTTPServer"):
            script = self.folder / "server.py"
            rest = "".join(parts[:cut] + parts[4:]).replace("FastWSHandler)", f"{client})")
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

@functools.cache
def browser():  # one for all tests
    need("sync_playwright" in globals(), "Playwright", "pip install playwright")
    need(CHROMIUM, "Chromium", "install your system's package, on Debian `apt-get install chromium`")
    need(JQUERY.exists() and AXE.exists(), "jQuery or axe-core", "npm install --prefix .ci jquery@4.0.0 axe-core@4")
    playwright = unittest.enterModuleContext(sync_playwright())
    expect.set_options(timeout=WAIT * 1000)
    return unittest.enterModuleContext(playwright.chromium.launch(
        executable_path=CHROMIUM, args=["--no-sandbox", "--disable-features=LocalNetworkAccessChecks"]))


def answer(route, body, kind="text/javascript"):
    route.fulfill(body=body, content_type=kind, headers={"Access-Control-Allow-Origin": "*"})


class PageTest(ChatTest):
    """A test with windows of a browser.  A test can let a page's clock run ahead; window.ws is its socket."""

    def window(self, nick=None, url=None, size=(1000, 600), clock=None, parts=3, jquery=None, **options):
        """Return a page, in which this nick has joined.  Its script has only so many of its parts."""
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
        if parts < 3:
            rest = re.compile(rf"(?s)// ==== Part {parts + 1}.*(?=}}\);)")
            page.route("**/", lambda route: answer(route, rest.sub("", route.fetch().text()), "text/html"))
        page.goto(url or f"http://localhost:{self.chat.port}/", wait_until="commit" if jquery else "load")
        if not jquery:
            expect(page.get_by_role("button", name="Join")).to_be_enabled()
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
        yield
        page.context.set_offline(False)

    def runs(self, page, until=None, status="Connected", seconds=60):  # let its clock run until it has this status
        while not (until() if until else page.locator("#status").text_content() == status):
            self.assertGreater(seconds := seconds - 3, 0, page.locator("main").inner_text())
            page.clock.run_for(3000)
            page.wait_for_timeout(20)  # what was sent meanwhile arrives


class ThePageChats(PageTest):  # part 1 of the page
    CHANGES = "server.HEARTBEAT = 0.2"

    def test_two_windows_talk_and_markup_is_text(self):
        ann, markup = self.window(), "<img src=x onerror=alert(1)><b>bold</b>"
        self.assertRegex(ann.get_by_label("Nick").input_value(), r"^User\d+$")
        self.join(ann, "  Ann ")
        self.assertEqual(ann.get_by_text("Post as").text_content(), "Post as Ann")
        expect(ann.get_by_label("Nick")).to_be_hidden()
        self.shows(ann, "chat server connected")
        self.post(ann, "hello", "   ", "", markup)
        bob = self.window("<img src=x>")
        self.post(bob, "hi Ann")
        for page in ann, bob:
            self.says(page, ["hello", markup, "hi Ann"])
            self.shows(page, "<img src=x> joined")
            expect(page.locator("#chat img, #chat p b, #chat .error, #sending li")).to_have_count(0)
            expect(page.get_by_text("2 online")).to_be_visible()
        bob.close()
        self.shows(ann, "<img src=x> left")
        expect(ann.get_by_text("1 online")).to_be_visible()

    def test_part_1_alone_is_a_chat_and_does_not_lose_what_is_typed_without_a_word(self):
        ann, bob = (self.window(nick, parts=1) for nick in ("Ann", "Bob"))
        self.post(ann, "hello")
        self.says(bob, ["hello"])
        self.post(bob, "hi Ann")
        self.says(ann, ["hello", "hi Ann"])
        with self.offline(ann):
            self.shows(ann, "chat server disconnected")
            self.post(ann, "are you there?")
            expect(ann.get_by_role("button", name="Post")).to_be_disabled()
            expect(ann.get_by_text("2 online")).to_have_count(0)
            expect(ann.get_by_label("Post as")).to_have_value("are you there?")

    def test_until_jquery_has_come_nobody_can_join_and_the_page_says_why(self):
        held, jquery = [], JQUERY.read_bytes()
        page = self.window(jquery=lambda route: held.append(route))
        nick, join, why = page.get_by_label("Nick"), page.get_by_role("button"), page.get_by_text("waiting for jQuery")
        for typed, body in ("Annabelle", jquery), ("Bella", jquery), ("Cleo", b""), ("Dan", jquery + b" "):
            self.post(page, typed, label="Nick")  # this wins over a guest's name, and over the nick before the reload
            expect(why).to_be_visible()
            expect(join).to_be_disabled()
            while not held:
                page.wait_for_timeout(10)
            answer(held.pop(), body)
            page.wait_for_load_state()
            expect(nick).to_have_value(typed)
            expect(why).to_be_visible(visible=body != jquery)
            expect(join).to_be_enabled(enabled=body == jquery)
            if body == jquery:
                join.click()
                self.shows(page, f"{typed} joined")
            page.reload(wait_until="commit")

    def test_a_message_that_is_refused_is_not_lost(self):
        ann = self.window("Ann")
        box = ann.get_by_label("Post as")
        self.post(ann, "x" * 1240)
        expect(ann.locator("#chat .error", has_text="1,240 characters, and 1,000 is the most")).to_be_in_viewport()
        expect(box).to_have_value("x" * 1240)
        with self.chat.frozen():
            box.press("Enter")
            box.fill("meanwhile")
        expect(box).to_have_value("x" * 1240 + " meanwhile")
        with self.offline(ann):
            self.post(ann, "short")
        self.runs(ann)
        self.says(ann, ["short"])
        expect(box).to_have_value("")  # what was refused is not sent again

    def test_markup_could_not_run_even_if_it_got_into_the_page(self):
        page = self.window()
        page.evaluate("""() => {
            window.seen = new Set();
            document.addEventListener('securitypolicyviolation', evt => seen.add(evt.effectiveDirective));
            document.body.innerHTML = '<img src=x><b onclick="seen.add(0)">b</b><iframe src="/"></iframe>'
                + '<base href="https://example.com/"><style>b { color: red }</style><form action="/evil"></form>';
            document.querySelector('b').click();
            document.forms[0].submit();
            for (const script of [{textContent: 'seen.add(0)'}, {src: '/evil.js'}])
                document.body.append(Object.assign(document.createElement('script'), script));
            fetch('https://example.com/').catch(() => {});
        }""")
        page.wait_for_function("() => seen.size > 7")
        self.assertEqual(page.evaluate("[...seen].sort().join(' ').replaceAll('-src', '')"),
                         "base-uri connect form-action frame img script-attr script-elem style-elem")


class ThePageLosesNothing(PageTest):  # part 2 of the page
    CHANGES = "server.PAUSE = 0"

    def test_a_server_that_is_back_is_told_in_order_what_was_posted_meanwhile_and_in_the_minute_before(self):
        ann, bob = (self.window(nick) for nick in ("Ann", "Bob"))
        self.post(ann, "long ago")
        self.shows(ann, "long ago")
        ann.clock.run_for(61_000)
        self.post(ann, "before")
        self.shows(bob, "before")
        self.assertEqual(self.chat.stop(), (0, ""))
        self.shows(ann, "chat server disconnected: the server stops (1001)")
        expect(ann.locator("header")).to_contain_text("Disconnected. Trying again …")
        self.post(ann, "mean<b>while", "and this")
        expect(ann.locator("#sending li")).to_have_text(["mean<b>while", "and this"])
        self.start(port=self.chat.port)
        self.runs(ann)
        self.post(ann, "and now")
        self.runs(bob)
        history = ["before", "mean<b>while", "and this", "and now"]
        for page in ann, bob:
            self.says(page, ["long ago", *history])
            expect(page.get_by_text("may be missing")).to_have_count(0)
        self.assertEqual(self.guest().said("and now"), history)

    def test_a_dead_network_is_noticed_and_given_up_and_when_it_is_back_the_page_is_too_also_without_part_3(self):
        ann, bob = self.window("Ann", parts=2), self.guest("Bob")
        ann.evaluate("window.dead = ws")
        with self.chat.frozen():
            self.runs(ann, status="Disconnected.", seconds=45)  # it only reads
            self.post(ann, "can you hear me?")
            self.runs(ann, lambda: len(ann.sockets) > 2)  # an attempt that meets silence is not the last one
            self.post(ann, "hello?")
        self.runs(ann)
        bob.until("hello?")
        for message in "yes", "go on":
            bob.say(message)
            self.shows(ann, message)
            ann.clock.run_for(12_000)  # less than 20 s
            ann.evaluate("dead.dispatchEvent(new Event('close'))")  # TCP has noticed at last
        self.says(ann, ["can you hear me?", "hello?", "yes", "go on"])
        expect(ann.get_by_text("chat server disconnected")).to_have_count(1)

    def test_a_page_comes_back_after_a_random_pause_and_what_it_missed_is_filled_in_or_owned_up_to(self):
        ann, bob = self.window("Ann"), self.guest("Bob")
        ann.clock.pause_at(time.time() + 5)
        for count, gap, chance, pause, quiet in (50, 0, 0, 1000, 0), (150, 1, 0.999, 4996, 17_000):
            ann.clock.run_for(quiet)  # after 20 s, it would give up, but its connection is lost before
            with self.offline(ann, chance):
                ann.clock.run_for(pause - 100)
                self.assertEqual(ann.evaluate("ws.readyState"), 3)  # closed: it has not tried yet
                for i in range(count):
                    bob.say(f"{count}-{i}")
                bob.until(f"{count}-{count - 1}")
            ann.clock.run_for(200)
            self.shows(ann, f"{count}-{count - 1}")
            expect(ann.get_by_text("messages may be missing here")).to_have_count(gap)
        ws = ann.evaluate_handle("ws")
        ann.clock.run_for(6000)
        self.assertTrue(ws.evaluate("ws => ws === window.ws"))  # and did not try once more
        self.says(ann, [*(f"50-{i}" for i in range(50)), *(f"150-{i}" for i in range(50, 150))])
        ann.evaluate("data => ws.onmessage({data})", json.dumps({"data": [{"type": "message", "message": ""}] * 100}))
        expect(ann.get_by_text("may be missing")).to_have_count(1)  # these came at one moment, and not after a gap
        expect(self.window("Cleo").get_by_text("may be missing")).to_have_count(0)  # a newcomer misses nothing

    def test_nothing_is_lost_or_doubled_when_connections_break_and_servers_stop_or_die(self):
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
                self.chat = self.start(port=self.chat.port)
        for page in pages:
            expect(page.locator("#chat .message")).to_have_count(len(lines))
            expect(page.locator("#sending li")).to_have_count(0)
            self.assertEqual(sorted(page.locator("#chat .message p").all_text_contents()), sorted(lines))


class ThePageIsGoodToRead(PageTest):  # part 3 of the page, and its style sheet
    CHANGES = "server.PAUSE = 0"

    def test_a_name_and_a_time_stand_over_what_one_says_in_one_go_and_each_script_has_its_direction(self):
        noon = 1354536000  # on 3 December 2012; after each two messages, it is an hour later
        self.chat = self.start(changes=f"server.time.time = lambda: {noon} + len(server.messages) // 2 * 3600")
        ann, bob = self.window(clock=noon, timezone_id="UTC"), self.guest()
        for label in "Nick", "Post as":
            ann.get_by_label(label).fill("مرحبا" + "\ufe0f" * (label == "Nick"))  # some keyboards add this to emoji
            expect(ann.get_by_label(label)).to_have_css("direction", "rtl")
            ann.keyboard.press("Enter")
        self.shows(ann, "مرحبا 12:00")
        for nick, message in ("Bob", "1"), ("Bob", "2"), ("Bob", "two  spaces\nand a break"), ("Cleo", "مرحبا Bob!"):
            bob.say(message, nick)
        self.assertLess(self.shows(ann, "مرحبا Bob!").locator("p").evaluate("""p => {
            const letter = new Range(); letter.setStart(p.firstChild, 0); letter.setEnd(p.firstChild, 1);
            return p.getBoundingClientRect().right - letter.getBoundingClientRect().right; }"""), 20)  # at the right
        copied = ann.evaluate("getSelection().selectAllChildren(jQuery('#chat')[0]), getSelection().toString()")
        self.assertRegex(copied, r"Bob 12:00.*\s+1\s+Bob 1:00.*\s+2\s+two  spaces\nand a break\s+Cleo 2:00")
        self.assertNotIn("2012", copied)
        tomorrow = self.window("Tom", clock=noon + 86400, timezone_id="UTC")
        expect(tomorrow.get_by_text("2012").first).to_be_visible()

    def test_an_address_becomes_a_link_and_ends_where_a_person_would_end_it(self):
        ann, bob, said = self.window("Ann"), self.guest("Bob"), []
        for marked in (  # what is in {} becomes a link
            "{https://a.example/Blur_(band)} ({https://a.example/Blur_(band)}), [{https://a.example/Blur_(band)}].",
            "{http://a.example/?b=c&d=%20#e}; ({https://b.example/d}.) or {HTTPS://C.EXAMPLE:80}?",
            "{https://a.example},{https://b.example/1,2} 看{https://d.example/路}。好，{https://e.example}…",
            "“{https://a.example/x}” «{https://b.example}» '{https://c.example}' {https://a.example/Blur_(band)}!",
            "{https://a.example/}\u202egpj.exe {https://b.example}\u200b/c {https://c.example/}\u3164d",
            "*{https://a.example}* <{https://b.example}> `{https://c.example}` javascript:alert(1), ftp://d, https://",
        ):
            bob.say(re.sub("[{}]", "", marked))
            said.append(re.sub("[{}]", "", marked))
            links = self.shows(ann, said[-1]).locator("a").evaluate_all(
                "links => links.map(a => [a.getAttribute('href'), a.textContent, a.rel, a.target])")
            self.assertEqual(links, [[link, link, "noreferrer", "_blank"] for link in re.findall("{(.*?)}", marked)])
        self.says(ann, said)

    def test_own_messages_stand_apart_and_a_reload_knows_them_and_the_nick_and_another_tab_does_not(self):
        self.guest("Bob").say("hi all")
        page = self.window()
        page.keyboard.type("Ann\nhi Bob\n")  # everything by keyboard
        page.get_by_label("Post as").fill("by a click")
        page.get_by_role("button", name="Post").click()
        page.keyboard.type("and the caret is there\n")
        self.shows(page, "the caret is there")
        page.keyboard.press("Shift+Tab")
        expect(page.get_by_role("region", name="Conversation")).to_be_focused()  # the arrow keys scroll it
        page.reload()
        expect(page.get_by_label("Nick")).to_have_value("Ann")
        page.get_by_role("button", name="Join").click()
        self.shows(page, "the caret is there")
        self.assertEqual(page.locator("#chat .message p").evaluate_all(
            "all => all.map(p => p.getBoundingClientRect()).map(box => box.left + box.right > innerWidth)"),
            [False, True, True, True])
        tab = page.context.new_page()
        tab.goto(page.url)
        expect(tab.get_by_label("Nick")).not_to_have_value("Ann")

    def test_the_end_stays_in_view_at_any_zoom_and_a_reader_gets_away_from_it_and_back(self):
        pages = [self.window("Ann", device_scale_factor=zoom, size=(800, 500)) for zoom in (1, 0.67, 0.9, 1.1)]
        ann, bob = pages[0], self.guest("Bob")
        for i in range(60):
            bob.say(f"line {i}." + " and more" * (i % 31))
        for page in pages:
            expect(self.shows(page, "line 59.")).to_be_in_viewport(ratio=1)
        newest, place, log = ann.get_by_role("button", name="↓"), self.shows(ann, "line 45."), ann.locator("#log")
        log.hover()
        ann.mouse.wheel(0, -900)
        expect(newest).to_have_text("Newest ↓")
        top = place.bounding_box()["y"]
        for i in range(60, 66):  # the room talks on
            bob.say(f"line {i}.")
        expect(newest).to_have_text("6 new ↓")
        self.assertAlmostEqual(place.bounding_box()["y"], top, delta=3)
        newest.click()
        expect(self.shows(ann, "line 65.")).to_be_in_viewport(ratio=1)
        expect(newest).to_be_hidden()
        ann.keyboard.type("the caret is in the box\n")
        self.shows(ann, "the caret is in the box")
        log.press("PageUp")
        newest.press("Enter")
        expect(ann.get_by_label("Post as")).to_be_focused()
        log.press("PageUp")
        expect(newest).to_be_visible()
        self.post(ann, "whoever posts wants to see it")
        for height in 500, 250:  # a keyboard comes up
            ann.set_viewport_size({"width": 800, "height": height})
            expect(self.shows(ann, "whoever posts")).to_be_in_viewport(ratio=1)

    def test_a_page_keeps_500_messages_among_many_who_come_and_go_and_a_hidden_tab_counts_in_its_title(self):
        ann = self.window("Ann")
        ann.evaluate("""() => {
            Object.defineProperty(document, 'hidden', {value: true, configurable: true});
            document.dispatchEvent(new Event('visibilitychange'));
            const data = Array.from({length: 600}, (_, i) => [{type: 'notice', message: `Visitor ${i} joined`},
                {type: 'message', id: `x${i}`, nick: 'Bob', message: `line ${i}`, time: 0}]).flat();
            ws.onmessage({data: JSON.stringify({type: 'list', data})});
        }""")
        self.says(ann, [f"line {i}" for i in range(100, 600)])
        self.assertIn(ann.locator("#chat .notice").count(), range(11, 100))
        expect(self.shows(ann, "line 599")).to_be_in_viewport(ratio=1)
        self.post(ann, "my own")
        self.shows(ann, "my own")
        expect(ann).to_have_title("(600) ScopyChat")
        ann.evaluate("delete document.hidden, document.dispatchEvent(new Event('visibilitychange'))")
        expect(ann).to_have_title("ScopyChat")

    def test_a_screen_reader_reads_out_once_what_is_new_but_not_the_history_and_not_each_attempt(self):
        bob = self.guest("Bob")
        bob.say("history")
        bob.until("history")
        ann = self.window()
        ann.evaluate("""() => {
            window.read = '';
            new MutationObserver(records => records.forEach(record => record.addedNodes.forEach(node => {
                read += record.target.closest('[role=status], [aria-live=polite]') ? node.textContent : '';
            }))).observe(document.body, {childList: true, subtree: true});
        }""")
        self.join(ann, "Ann")
        self.shows(ann, "history")
        self.runs(ann, lambda: ann.locator("#chat").get_attribute("aria-live") == "polite")
        self.post(ann, "my own line")
        self.shows(ann, "my own line")
        with self.offline(ann):
            self.runs(ann, lambda: len(ann.sockets) > 2)
        read = re.findall("history|my own line|Connecting|Connected|Disconnected", ann.evaluate("read"))
        self.assertEqual(read, ["Connecting", "Connected", "my own line", "Disconnected"])

    def test_on_small_and_odd_screens_and_paper_and_axe_finds_nothing(self):
        page = self.window(size=(320, 568), bypass_csp=True)  # for axe, which is a script
        page.add_script_tag(path=AXE)

        def check():
            for scheme in "light", "dark":
                page.emulate_media(color_scheme=scheme, media="screen")
                self.assertEqual(page.evaluate("async () => (await axe.run()).violations.map("
                                               "v => v.id + ': ' + v.nodes.map(n => n.html).join())"), [])

        check()
        self.join(page, "W" * 30)
        bob = self.guest()
        bob.say("W" * 99)
        page.evaluate("ws.send('bad')")
        expect(page.locator("#chat .error")).to_be_in_viewport()
        for i in range(30):
            bob.say("the last line", f"User{i}")
        expect(page.get_by_text("the last line")).to_have_count(30)
        self.assertTrue(page.locator("#chat p").evaluate_all("all => all.every(p => p.scrollWidth <= p.clientWidth)"))
        page.emulate_media(media="print")
        self.assertGreater(page.evaluate("document.documentElement.scrollHeight"), 1200)
        check()
        with self.offline(page):
            self.post(page, "on its way")
            expect(page.locator("header")).to_have_css("background-color", "rgb(179, 38, 30)")
            check()
            page.emulate_media(forced_colors="active")
            box, button = page.get_by_label("Post as"), page.get_by_role("button", name="Post")
            expect(button).to_have_css("border-top-width", "1px")
            for width, height, lines in (320, 568, 5), (320, 256, 1), (740, 180, 1):  # 256: a desktop at 400 %
                page.set_viewport_size({"width": width, "height": height})
                self.assertEqual(page.locator("html").evaluate("h => [h.scrollWidth, h.scrollHeight]"), [width, height])
                for part in box, button, *map(page.get_by_text, ("on its way", "Trying again")):
                    expect(part).to_be_in_viewport(ratio=1)
                self.assertGreaterEqual(page.locator("#log li p").evaluate_all("""texts => texts.filter(text => {
                    const {left, right, top, bottom} = text.getBoundingClientRect();
                    return text.contains(document.elementFromPoint((left + right) / 2, (top + bottom) / 2));
                }).length"""), lines, (width, height))

    def test_it_asks_before_a_window_with_a_draft_or_an_unsent_message_closes(self):
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
        next(line for line in process.stdout if ready in line)
        return process

    def test_its_commands_and_what_it_points_to_and_quotes_are_there(self):
        for command in "python server.py", "python -m unittest":
            self.assertTrue(self.block("sh", f"&& {command}").endswith(f"&& {command}\n"))
        files = [(HERE / name).read_text() for name in ("server.py", "test.html")]
        self.assertRegex(files[0], r'\A# /// script\n# requires-python = ">=3.11"\n.*"tornado>=6.6"]\n# ///\n')
        for line in self.block("python", "def flush").splitlines():
            self.assertIn(line.strip(), files[0])
        for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)#\"]+)", self.TEXT):
            self.assertTrue("://" in target or (HERE / target).exists(), target)
        for name in re.findall(r"`([A-Za-z_]{4,})`", re.sub("(?s)## Beside.*## Exer", "", self.TEXT)):
            self.assertRegex("".join(files), rf"\b{name}\b")

    def test_the_mended_loop_of_the_post_is_a_chat(self):
        loop = self.block("python", "con.write_message(data)").replace("websocket.", "server.websocket.")
        chat = self.start(changes=f"connections = server.connections\n{loop}\n"
                                  "server.application = server.web.Application([('/chat', WSHandler)])")
        ann, bob = self.guest(chat=chat), self.guest(chat=chat)
        ann.say("hi")
        self.assertEqual([ann.frame(), bob.frame()], [new_message("hi")] * 2)

    def test_behind_a_proxy_with_tls_and_under_a_path(self):
        need(shutil.which("caddy"), "Caddy", "install your system's package, on Debian `apt-get install caddy`")
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

    def test_one_room_in_two_processes(self):
        need(shutil.which("redis-server"), "Redis", "install your system's package, on Debian redis-server")
        need(importlib.util.find_spec("redis"), "redis for Python", "pip install redis")
        script, port = self.folder / "scale.py", free_port()
        script.write_text(self.block("python", "import server"))
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
        ann.say("the end")
        said, heard = cleo.said("the end"), list(dict.fromkeys(bob.said("the end")))  # a repetition is answered
        self.assertEqual((heard, sorted(said)), (said, sorted([*map(str, range(40)), "twice", "the end"])))

        redis.terminate()
        redis.wait()
        ann.say("wait for Redis")
        start_redis()
        bob.until("wait for Redis")
        for guest in guests:
            guest.vanish()
        self.assertEqual([chat.stop() for chat in chats], [(0, "")] * 2)
        self.assertEqual(self.guest(chat=start()).said("wait for Redis"), [*said, "wait for Redis"])
