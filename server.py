# /// script
# requires-python = ">=3.11"
# dependencies = ["tornado>=6.6"]
# ///
"""ScopyChat: the realtime chat of the post "Websockets & Python3" (2012), on today's Tornado.

    pip install -U tornado
    python server.py        then open http://localhost:8888/ in two windows

The first part of this script, "The chat", is the post's server: its handlers, in its order, under its names, with its
mistakes mended.  A comment that starts with "2012:" says what the post had in that place.  Added are joining and
leaving, a suggested name for each visitor, the time of a message, and the number of clients that are online.

The first part is a complete chat.  The other parts make it fit for a real network, and you can skip them at first.
Each answers a question: What if 1,000 people talk at once?  What if a connection breaks?  What if a stranger sends
nonsense, or does not stop?  How can the server be faster?  How does it start and stop?

Server and page send each other JSON objects.  The page, or whatever else connects, is called a client.  A client sends
two types of objects:

    {"type": "join", "nick": "Ann"}                 first
    {"type": "new_message", "message": "hi"}        whenever somebody posts a message

The server sends one type, a list of entries.  A new client gets the history; after that, every client gets what is new.

    {"type": "list", "data": [...], "online": 3}

An entry is what the page shows as one line: a message, or a notice from the server.  (A later part adds an error.)

    {"type": "message", "nick": "Ann", "message": "hi", "time": 1795350666.49}
    {"type": "notice", "message": "Ann joined"}
"""
import collections
import contextlib
import itertools
import json
import time

from tornado import web, websocket

# Only the other parts need these:
import argparse
import asyncio
import os
import secrets
import signal
import unicodedata

from tornado import gen, httpserver

# =================================================================================================
# The chat
# =================================================================================================

connections = set()  # 2012: a list, with a check before each append and each remove.  A set needs no checks.
messages = collections.deque(maxlen=100)  # 2012: a list, which grew for ever.  This one keeps the newest 100.
guests = itertools.count(1)  # 1, 2, 3 …: the page suggests the nicks User1, User2, User3 …


class MainHandler(web.RequestHandler):
    """Answers GET / with the page.  When somebody joins, the page opens the WebSocket."""

    def get(self):
        # Tornado puts the guest's name where test.html has {{ guest }}.
        self.render("test.html", guest=f"User{next(guests)}")


class WSHandler(websocket.WebSocketHandler):
    """One client.  Tornado makes an object of this class for each connection to /chat.

    A WebSocket starts as an HTTP request that asks for a change of the protocol.  The server answers with status 101.
    This exchange is the handshake.  After it, the TCP connection stays open, and each side may send at any time.

    Tornado does the handshake.  Then it calls the methods here: open at the start, on_message whenever the client
    has sent something, on_close at the end.
    """

    nick = None  # until the client joins

    def write_json(self, entries):
        """Send a list of entries to this client."""
        # 2012: write_json(**kwargs) with json.dumps(**kwargs).  That is a TypeError: dumps wants one object.
        # If the client has just gone, write_message raises an error.  It can be ignored: Tornado will call on_close.
        with contextlib.suppress(websocket.WebSocketClosedError):
            return self.write_message(json.dumps(as_object(entries)))

    def open(self):
        connections.add(self)
        self.write_json(list(messages))  # the history, as a list: JSON knows no deque

    def on_message(self, data):
        data = json.loads(data)
        if data["type"] == "join":
            self.nick = data["nick"]
            self.announce("joined")
        else:
            # 2012: data was to go on as it came.  Here the server sets type and time, and the nick, if the
            # client has joined.  (The post's page does not join.  It sends a nick with each message, and works here,
            # too.)  Other fields pass as they came.
            data.update(type="message", nick=self.nick or data["nick"], time=time.time())
            self.broadcast(data)

    def on_close(self):
        connections.discard(self)
        if self.nick:
            self.announce("left")

    def announce(self, what):
        """Tell everybody that this client "joined" or "left"."""
        self.broadcast({"type": "notice", "message": f"{self.nick} {what}"})

    def broadcast(self, entry):
        """Tell everybody about an entry.  (Later parts override this method.)"""
        send_to_all([entry])


def send_to_all(entries):
    """Send a list of entries to all clients.  Keep the messages among them, for clients that come later."""
    # 2012: for con in connections:
    #           messages.append(data)
    #           con.write_json(data)
    #
    # This loop would have kept a message once for each client.  And its write_json(data) was one more TypeError.
    messages.extend(entry for entry in entries if entry["type"] == "message")
    for con in connections:
        con.write_json(entries)


def as_object(entries):
    """Wrap a list of entries as the object that the clients get."""
    # 2012: the list's type was "message".  But the post's page looks for "list".  It would have logged "undefined".
    return {"type": "list", "data": entries, "online": len(connections)}


application = web.Application([
    (r"/", MainHandler),  # HTML chat homepage
    (r"/chat", WSHandler),  # WebSocket server
])


# =================================================================================================
# This was the whole chat.  These lines would start it:
#
#     import asyncio
#
#     async def main():
#         application.listen(8888, "localhost")
#         await asyncio.Event().wait()  # for ever
#
#     asyncio.run(main())
#
# The script's own main is at its end, in "How it starts".  It also sends the heartbeat, which comes later.
# (A page with all parts of test.html needs the heartbeat.  Without it, the page connects again and again.)
#
# Four parts come before that.  Each makes a subclass of the class before:
#
#     A crowd                 CrowdWSHandler       overrides broadcast
#     A network that fails    ReliableWSHandler    overrides broadcast, announce
#     Strangers               PublicWSHandler      overrides open, on_message, write_json
#     Speed                   FastWSHandler        overrides open, write_json
#
# Only CrowdWSHandler.broadcast and FastWSHandler.write_json do not call super().
#
# The script runs the last class, and so all parts.  To see what the other parts are good for, or to try what
# you have changed in the first part, run the first part alone:
#
#     python server.py --handler WSHandler
# =================================================================================================


# =================================================================================================
# A crowd
#
# When 1,000 people post at the same time, WSHandler sends 1,000 lists to each of 1,000 clients.  That
# is a million calls to the operating system, and everybody waits.
#
# The event loop is one thread that works in rounds.  In each round, it takes what has arrived on all the
# connections, and Tornado calls on_message for it.
#
# So here, broadcast does not send.  It puts the entry into an outbox, and asks the event loop to call
# flush in the next round.  By then, all that arrived in this round is in the outbox, and flush sends it
# as one list.  When 1,000 messages arrive together, each of the 1,000 clients gets one list with all of
# them.  This short delay goes unnoticed.
# =================================================================================================

outbox = []  # the entries that flush will send


class CrowdWSHandler(WSHandler):
    """A client among many that post at the same time."""

    def broadcast(self, entry):
        if not outbox:  # This is the first entry in this round.
            asyncio.get_running_loop().call_soon(flush)
        outbox.append(entry)


def flush():
    """Send all that is in the outbox to all clients."""
    entries = outbox.copy()
    # Empty the outbox first.  Otherwise one error in send_to_all would end all sending: see broadcast.
    outbox.clear()
    send_to_all(entries)


# =================================================================================================
# A network that fails
#
# When a connection breaks, a page cannot know which of its last messages have arrived.  So it makes a
# new connection, and sends them again.  It also gives each message an id, at random:
#
#     {"type": "new_message", "message": "hi", "id": "k3j9x"}
#
# By the id, the server recognises a message that it already has.  So the others hear it once.
#
# A network can also die in silence.  To the page, that looks like a room in which nobody talks.  So
# every 10 seconds, the server sends an empty list, called the heartbeat.  A page that gets no list for
# 20 seconds makes a new connection.  (The server finds dead clients by pings, which are a part of
# WebSockets.  Browsers answer pings by themselves, and do not tell the page.)
# =================================================================================================

MEMORY = 10_000  # messages

known = {}  # id -> message, the oldest first


class ReliableWSHandler(CrowdWSHandler):
    """A client whose page may make a new connection, and send its last messages again."""

    def broadcast(self, entry):
        if entry["type"] == "message":
            id = entry.setdefault("id", secrets.token_urlsafe())  # The post's page sends none.
            if id in known:
                return self.write_json([known[id]])  # a repetition: confirm it to its sender only
            known[id] = entry
            if len(known) > MEMORY:
                del known[next(iter(known))]  # the oldest
        super().broadcast(entry)

    def announce(self, what):
        # When Ann comes back, the server may not know yet that her old connection is dead.  So this announces her only
        # if no other connection has the same nick.  (Nicks are not accounts: this may be another Ann.)
        if not any(con.nick == self.nick for con in connections if con is not self):
            super().announce(what)


def heartbeat():
    """Send an empty list to all clients, at once and then every 10 seconds."""
    asyncio.get_running_loop().call_later(10, heartbeat)
    send_to_all([])


# =================================================================================================
# Strangers
#
# A stranger may send anything, may send without end, and may not read what the server sends.
#
# In the parts before, wrong data goes on to everybody, or raises an exception in on_message: then Tornado
# logs a traceback, and disconnects the client.  Here all data is checked first.  A client that sends something
# wrong gets an error, which is a third type of entry.  Nobody else sees it.
#
#     {"type": "error", "message": "what was wrong", "id": "k3j9x"}
#
# After each message, the server waits a moment before it handles this client's next one.  A client that
# leaves a list unread for 20 seconds is disconnected.  Otherwise unread lists would fill the memory.  (If
# the client is only slow, its page makes a new connection, and gets the history.)
#
# (Tornado already refuses WebSockets that the pages of other sites open.)
# =================================================================================================

# The fields that a client may send, and how many characters each may have ("new_message" has 11):
LENGTHS = {"type": 11, "nick": 30, "message": 1000, "id": 64}
# Unicode's categories of characters that show nothing by themselves: control, format, combining, and spaces.
INVISIBLE = {"Cc", "Cf", "Mn", "Zs", "Zl", "Zp"}
PATIENCE = 20  # seconds


class PublicWSHandler(ReliableWSHandler):
    """A client that may do anything."""

    pause = 0.02  # seconds after each message

    def open(self):
        # gone: True when the connection has ended.  waiting: the time of each list that TCP has not taken yet.
        self.gone, self.waiting = False, collections.deque()
        super().open()

    def on_message(self, data):
        if self.gone:  # Tornado still hands over what came before the connection ended.  That may be a lot.
            return self.on_connection_close()  # This method of Tornado's puts an end to it.
        fields = parse(data)
        try:
            check(fields, self.nick)
        except ValueError as problem:
            id = fields.get("id")  # By its id, the page knows which message was refused.
            self.write_json([{"type": "error", "message": str(problem), "id": id if isinstance(id, str) else None}])
        else:
            super().on_message(data)  # It parses data once more, so that an edit of it takes effect.
        # gen.sleep returns a future: an object that tells when something is done.  When on_message returns a future,
        # Tornado waits for it before it handles this client's next message.  Meanwhile messages wait in Tornado's and
        # in TCP's buffers.  When these are full, TCP makes the client wait.  This is called backpressure: a client that
        # floods the chat mostly slows itself down.  A client with many unread lists waits a second.  Otherwise the
        # answers to all that it sends would fill the memory.
        return gen.sleep(1 if len(self.waiting) > 10 else self.pause)

    def write_json(self, entries):
        # WSHandler.write_json returns what Tornado's write_message returns: a future that is done when TCP has taken
        # the list.  If the connection has ended, it returns None.
        self.watch(super().write_json(entries))

    def watch(self, future):
        """Disconnect this client if it has left a list unread for too long.

        future: the future of the newest list, or None if the connection has ended.
        """
        self.gone = future is None
        if future:
            self.waiting.append(time.monotonic())
            future.add_done_callback(self.taken)
            if time.monotonic() - self.waiting[0] > PATIENCE:
                # End the connection, but after the loop in send_to_all, as on_close changes connections.
                asyncio.get_running_loop().call_soon(self.on_connection_close)

    def taken(self, future):
        """Note that TCP has taken the oldest waiting list, or that the connection is broken."""
        self.waiting.popleft()
        if not future.cancelled():
            future.exception()  # asyncio logs an exception that nobody retrieves.


def parse(data):
    """Return the JSON object that a client has sent, or an empty one if it has sent something else."""
    with contextlib.suppress(ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        if isinstance(fields := json.loads(data), dict):
            return fields
    return {}


def check(fields, nick):
    """Raise ValueError, with the reason, if a client is not allowed to send these fields.

    nick: the one that the client has joined with, or None.
    """
    if fields.get("type") == "join" and not nick:
        required = {"nick"}
    elif fields.get("type") == "new_message":
        required = {"message"} if nick else {"nick", "message"}
    else:
        raise ValueError('Send a JSON object of the type "new_message" or, once, "join".')
    if missing := required - fields.keys():
        raise ValueError(f"Missing: {', '.join(sorted(missing))}.")
    for name, text in fields.items():
        if name not in LENGTHS:
            raise ValueError("Send no other fields than type, nick, message and id.")
        if not isinstance(text, str):
            raise ValueError(f"The {name} must be text.")
        if len(text) > LENGTHS[name]:
            raise ValueError(f"The {name} has {len(text):,} characters.  At most {LENGTHS[name]:,} are allowed.")
        if all(unicodedata.category(character) in INVISIBLE for character in text):
            raise ValueError(f"The {name} must not be blank.")


# =================================================================================================
# Speed
#
# A WebSocket sends data in frames.  A frame is the data with a header, which says how long the data is.
# For each client, write_json makes the same JSON, and Tornado makes the same frame.  This part makes the
# frame of a list once, for all clients, and hands it to TCP directly.
#
# The price: it needs Tornado's end of the TCP connection, ws_connection.stream, which Tornado does not
# document.  If a later Tornado changes that, run the script with PublicWSHandler, which does the same, but
# takes more time and memory.
# =================================================================================================


class FastWSHandler(PublicWSHandler):
    """A client to which frames are written directly."""

    def open(self):
        self.set_nodelay(True)  # Without this, TCP may hold a short frame back, to send it together with the next.
        super().open()

    def write_json(self, entries):
        if self.ws_connection is None or self.ws_connection.is_closing():
            return self.watch(None)
        stream, rest = self.ws_connection.stream, frame(entries)
        if not stream.writing():  # TCP has taken all that was sent before.
            # An OSError means that TCP has no room, or that the connection is broken.  stream.write can handle both.
            with contextlib.suppress(OSError):
                rest = rest[stream.write_to_fd(rest):]  # write_to_fd returns how many bytes TCP has taken.
        if rest:
            self.watch(stream.write(rest))  # Tornado keeps the rest until TCP has room.


shared = {"entries": None, "frame": None}  # the newest list that was put into a frame, and that frame


def frame(entries):
    """Return the WebSocket frame with a list of entries in it (RFC 6455, section 5.2)."""
    # send_to_all gives one list to all clients, and nobody changes a list later.  So all clients can share its frame.
    if shared["entries"] is entries:
        return shared["frame"]
    # ensure_ascii=False: letters such as я and 你 take two or three bytes, and not six.  errors="replace": JavaScript
    # can send half an emoji.  UTF-8 has no bytes for that, and it becomes a question mark.
    payload = json.dumps(as_object(entries), ensure_ascii=False).encode(errors="replace")
    # The first byte, 0x81, means: this is text, and all of it is in this frame.  Then comes the length.  Up to 125, it
    # takes one byte.  A greater length takes the number 126 and two bytes, or the number 127 and eight bytes.
    if len(payload) < 126:
        header = bytes([0x81, len(payload)])
    elif len(payload) < 65536:
        header = bytes([0x81, 126]) + len(payload).to_bytes(2, "big")
    else:
        header = bytes([0x81, 127]) + len(payload).to_bytes(8, "big")
    # A memoryview, so that write_json can take the rest of a frame without copying it.
    shared.update(entries=entries, frame=memoryview(header + payload))
    return shared["frame"]


# =================================================================================================
# How it starts
# =================================================================================================

HANDLERS = {cls.__name__: cls for cls in (WSHandler, CrowdWSHandler, ReliableWSHandler, PublicWSHandler, FastWSHandler)}
application.settings.update(
    websocket_ping_interval=20,  # seconds.  A client that has not answered by the next ping is disconnected.
    websocket_max_message_size=32 * 1024,  # bytes.  A client that sends more at once is disconnected.
    compiled_template_cache=False,  # Tornado reads test.html again for each visit, so an edit needs no restart.
)


async def main():
    """Run the chat until Ctrl+C or the signal SIGTERM stops it."""
    options = command_line()
    # Tornado asks added routes first.  So this class gets /chat, and not WSHandler.  (".*" means: under any host name.)
    application.add_handlers(".*", [(r"/chat", HANDLERS[options.handler])])
    # A client must end its request within 20 seconds, and send no body.  (A WebSocket may be idle for longer.)
    http_server = LimitedHTTPServer(application, idle_connection_timeout=20, body_timeout=20, max_body_size=0)
    try:
        http_server.listen(options.port, options.address)  # 2012: listen(8888), which let the whole network in
    except (OSError, UnicodeError) as error:
        raise SystemExit(f"Cannot listen on {options.address}, port {options.port}: {error}")
    stop = asyncio.Event()
    with contextlib.suppress(NotImplementedError):  # On Windows, Ctrl+C ends the script without a goodbye.
        for signum in signal.SIGINT, signal.SIGTERM:  # SIGINT is Ctrl+C
            asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    host = f"[{options.address}]" if ":" in options.address else options.address
    print(f"ScopyChat is open at http://{host}:{options.port}/ (Ctrl+C closes it)", flush=True)
    heartbeat()
    await stop.wait()
    await goodbye()


def command_line():
    """Return the options that the script was started with: port, address, handler."""
    parser = argparse.ArgumentParser(description="ScopyChat, a realtime chat on WebSockets.")
    parser.add_argument("--port", type=int, default=8888, help="default: %(default)s")
    # To Tornado, an empty address means the whole network.  Here it does not: it is too easily given by mistake.
    parser.add_argument("--address", default="localhost", help="0.0.0.0: all networks", type=lambda a: a or "localhost")
    parser.add_argument("--handler", default="FastWSHandler", choices=HANDLERS, help="the class for a client")
    options = parser.parse_args()
    if not 0 < options.port < 65536:
        parser.error("argument --port: a TCP port is a number from 1 to 65535")
    return options


class LimitedHTTPServer(httpserver.HTTPServer):
    """Tornado's HTTP server, but it hangs up on new clients when the process can open hardly any more files.

    To the operating system, a connection is an open file, and each process has a limit (`ulimit -n`).  At the limit,
    Tornado cannot accept a connection, and tries again at once, without end.
    """

    def handle_stream(self, stream, address):  # Tornado calls this for each new connection.
        # A new file gets the lowest number that is free.  So its number tells roughly how many files are open.
        limit = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1  # -1: no limit.  Windows has no sysconf.
        if 0 < limit - 16 < stream.socket.fileno():  # 16 files stay free for others, such as test.html.
            return stream.close()
        return super().handle_stream(stream, address)


async def goodbye():
    """Close all connections, and wait up to 2 seconds until the clients have closed them, too."""
    await asyncio.sleep(0.1)  # so that messages that have just arrived are still sent
    end = time.monotonic() + 2
    while connections and time.monotonic() < end:  # in a loop, as new clients may still come
        for con in connections:
            con.close(1001, "the server stops")  # 1001 means: going away (RFC 6455, section 7.4)
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    asyncio.run(main())  # 2012: IOLoop.instance().start().  Tornado now runs on asyncio's event loop.
