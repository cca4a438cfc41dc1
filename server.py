# /// script
# requires-python = ">=3.11"
# dependencies = ["tornado>=6.6"]
# ///
"""ScopyChat: the realtime chat of the post "Websockets & Python3" (2012), on today's Tornado.

    pip install tornado
    python server.py        then open http://localhost:8888/ in two windows

The first part of this script, "The chat", is the post's server: its pieces, in its order, under its names.  What was
wrong is mended.  New are joining and leaving, and the number of people online.  A comment that starts with "2012:"
says what the post had in that place.

The parts after it prepare the chat for a crowd, for a network that fails and for strangers.  You can skip them at
first: each adds one idea to the class WSHandler, and the chat works without it.

Server and page send each other JSON objects.  A client, which is an open page, sends two types of them:

    {"type": "join", "nick": "Ann"}                 first
    {"type": "new_message", "message": "hi"}        whenever somebody posts a message

The server sends one type, a list of entries.  A new client gets the history; after that, everybody gets what is new.

    {"type": "list", "data": [...], "online": 3}

An entry is what the page shows as one line: a message, or a notice of the server's.

    {"type": "message", "nick": "Ann", "message": "hi", "time": 1795350666.49}
    {"type": "notice", "message": "Ann joined"}
"""
import argparse
import asyncio
import collections
import contextlib
import functools
import itertools
import json
import os
import secrets
import signal
import time
import unicodedata

from tornado import gen, httpserver, web, websocket

# =================================================================================================
# The chat
# =================================================================================================

connections = set()  # 2012: a list, with a check before each append and each remove.  A set needs no checks.
messages = collections.deque(maxlen=100)  # 2012: a list, which grew for ever.  This one keeps the newest 100.
guests = itertools.count(1)


class MainHandler(web.RequestHandler):
    """Answers GET / with the page.  When somebody joins, the page opens the WebSocket."""

    def get(self):
        # Tornado fills the name in where test.html has {{ guest }}.  This idea is from the post's second server.
        self.render("test.html", guest=f"User{next(guests)}")


class WSHandler(websocket.WebSocketHandler):
    """One client.  Tornado makes an object of this class for each connection to /chat.

    A WebSocket starts as an HTTP request that asks for a change of the protocol.  The server agrees with status 101.
    This exchange is the handshake.  After it, the TCP connection stays open, and each side may send at any time.

    Tornado does the handshake.  Then it calls the methods here: open at the start, on_message whenever the client
    has sent something, on_close at the end.
    """

    nick = None  # until the client joins

    def write_json(self, *entries):
        """Send a list of these entries to this client."""
        # 2012: write_json(**kwargs), with json.dumps(**kwargs).  That is a TypeError: dumps wants one object.
        self.send(as_json(entries))

    def open(self):
        connections.add(self)
        # 2012: type='message'.  The post's page would have taken the history for one message, and shown "undefined".
        self.write_json(*messages)

    def on_message(self, data):
        data = json.loads(data)
        if data["type"] == "join":
            self.nick = data["nick"]
            self.announce("joined")
        else:
            # 2012: data as it came, with the nick in it, so that anybody could speak for anybody.  Here a client that
            # has joined speaks under that nick.  (The post's page does not join.  Its nick is believed as before.)
            nick = self.nick or data["nick"]
            self.broadcast({**data, "type": "message", "nick": nick, "time": round(time.time(), 2)})

    def on_close(self):
        connections.discard(self)
        if self.nick:
            self.announce("left")

    def announce(self, what):
        """Tell everybody that this client "joined" or "left"."""
        self.broadcast({"type": "notice", "message": f"{self.nick} {what}"})

    @staticmethod
    def broadcast(*entries):
        """Send a list of these entries to all clients.  Keep the messages for those who come later."""
        # 2012: for con in connections:
        #           messages.append(data)
        #           con.write_json(data)
        #
        # The loop would have kept a message once for each client.  And write_json(data) is a TypeError: it takes
        # keyword arguments.
        messages.extend(entry for entry in entries if entry["type"] == "message")
        data = as_json(entries)
        for con in connections:
            con.send(data)

    def send(self, data):
        # write_message raises this error if the client is already leaving.  Tornado will call on_close soon.
        with contextlib.suppress(websocket.WebSocketClosedError):
            self.write_message(data)


def as_json(entries):
    """Return a list of these entries as JSON, in UTF-8, as a WebSocket carries it."""
    # ensure_ascii would make six bytes of each letter of Greek or Hindi.  An emoji that was cut in half cannot be
    # written in UTF-8: a question mark replaces it.
    data = json.dumps({"type": "list", "data": entries, "online": len(connections)}, ensure_ascii=False)
    return data.encode(errors="replace")


def make_app(handler, **settings):
    """Return the application, which says what handles each path.  handler: the class for /chat."""
    return web.Application([
        (r"/", MainHandler),  # HTML chat homepage
        (r"/chat", handler),  # WebSocket server
    ], **settings)


# =================================================================================================
# That was the whole chat.  "How it starts", at the end, runs it.  Each part before that makes a class
# on top of the class before it.  This is what the classes define:
#
#     WSHandler            open  on_message  on_close  announce  broadcast  send
#     CrowdWSHandler                                             broadcast
#     ReliableWSHandler                                announce  broadcast  send
#     PublicWSHandler            on_message
#     FastWSHandler        open  on_message                                 send
#
# A message goes through them from below: on_message of Fast, Public and WSHandler, then broadcast of
# Reliable and Crowd, then flush, then broadcast of WSHandler, then send of Fast.
#
# The script runs the last class.  Another one runs with:   python server.py --handler WSHandler
# =================================================================================================


# =================================================================================================
# A crowd
#
# When 1,000 people post at the same time, WSHandler sends 1,000 lists to 1,000 clients.  That is a
# million calls to the operating system, and everybody waits.
#
# So a message is not sent at once.  Tornado's event loop is one thread that works in rounds.  In each
# round, it asks the operating system which connections have new data, and calls on_message for all of
# them.  Here on_message only puts what it has to send into an outbox.  In the next round, flush sends
# all of it as one list: 1,000 lists, with 1,000 messages in each.
#
# A message that arrives alone still leaves at once.
# =================================================================================================

outbox = []  # the entries that flush will send


class CrowdWSHandler(WSHandler):
    """A client among many that post at the same time."""

    def broadcast(self, entry):
        if not outbox:
            asyncio.get_running_loop().call_soon(flush)  # in the next round
        outbox.append(entry)


def flush():
    """Send all that is in the outbox to all clients."""
    entries = outbox.copy()
    outbox.clear()
    WSHandler.broadcast(*entries)


# =================================================================================================
# A network that fails
#
# When a connection breaks, a page cannot know which of its last messages have arrived.  So it connects
# again, and sends them again.  To recognise what it already has, the server needs an id in each message:
#
#     {"type": "new_message", "message": "hi", "id": "k3j9x"}
#
# The page makes a random one.  Whoever sends an id that was used before is taken to repeat a message.
#
# A network can also die in silence.  Then the page hears nothing, as in a quiet room.  So the server
# sends an empty list every 10 seconds, the heartbeat.  A page without it for 20 seconds connects again.
# =================================================================================================

HEARTBEAT = 10   # seconds
MEMORY = 10_000  # messages

known = {}  # id -> message, the oldest first


class ReliableWSHandler(CrowdWSHandler):
    """A client that may lose its connection, come back on a new one, and repeat its messages."""

    def broadcast(self, entry):
        if entry["type"] == "message":
            id = entry.setdefault("id", secrets.token_urlsafe())  # the post's page sends no id
            if id in known:
                return self.write_json(known[id])  # The others have this message.  Its sender learns that it arrived.
            known[id] = entry
            if len(known) > MEMORY:
                del known[next(iter(known))]  # the oldest
        super().broadcast(entry)

    def announce(self, what):
        # When Ann comes back, the server may not know yet that her old connection is dead.  To the others, she has
        # neither joined nor left.  (A second person who calls herself Ann is not announced either.)
        if not any(con.nick == self.nick for con in connections if con is not self):
            super().announce(what)

    def send(self, data):
        # write_message returns a future.  If the connection breaks before the data is sent, the future gets an
        # exception.  asyncio logs an exception that nobody has looked at, so this looks at it.
        with contextlib.suppress(websocket.WebSocketClosedError):
            self.write_message(data).add_done_callback(lambda future: future.cancelled() or future.exception())


def heartbeat():
    """Send an empty list to all clients, now and every 10 seconds from now on."""
    asyncio.get_running_loop().call_later(HEARTBEAT, heartbeat)
    WSHandler.broadcast()


# =================================================================================================
# Strangers
#
# A stranger may send anything, and may send without end.  So what a client sends is checked first, and
# each client has to wait a moment before the server reads on.  If something is wrong, the client gets
# an error, which is a third type of entry:
#
#     {"type": "error", "message": "what was wrong", "id": "k3j9x"}
#
# (Pages of other sites cannot connect.  Tornado compares the headers Origin and Host, and refuses them.)
# =================================================================================================

LENGTHS = {"nick": 30, "message": 1000, "id": 64}  # characters
PAUSE = 0.02  # seconds
INVISIBLE = {"Cc", "Cf", "Mn", "Zs", "Zl", "Zp"}  # Unicode's categories of characters that nobody sees alone


class PublicWSHandler(ReliableWSHandler):
    """A client that nobody knows."""

    def on_message(self, data):
        if self.is_gone():  # Tornado has read this before the client left.  A page will send it again.
            return None
        fields = parse(data)
        try:
            check(fields, self.nick)
        except ValueError as problem:
            id = fields.get("id")
            id = id if isinstance(id, str) and len(id) <= LENGTHS["id"] else None
            self.write_json({"type": "error", "message": str(problem), "id": id})
        else:
            super().on_message(data)
        # Tornado waits for the future that on_message returns before it reads this client's next message.  Meanwhile
        # the messages wait in TCP's buffers.  When the buffers are full, TCP makes the client wait.  This is called
        # backpressure: a client that floods the chat slows down itself, and nobody else.
        return gen.sleep(PAUSE)

    def is_gone(self):
        return self.ws_connection is None or self.ws_connection.is_closing()


def parse(data):
    """Return the JSON object that a client has sent, or an empty one."""
    with contextlib.suppress(ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        if isinstance(fields := json.loads(data), dict):
            return fields
    return {}


def check(fields, nick):
    """Raise ValueError, with a sentence for the client, if it may not send these fields.

    nick: the one that the client has joined with, or None.
    """
    if fields.get("type") == "join" and not nick:
        required = {"nick"}
    elif fields.get("type") == "new_message":
        required = {"message"} if nick else {"message", "nick"}
    else:
        raise ValueError('Send a JSON object of the type "new_message" or, once, "join".')
    for name in sorted(required | fields.keys() - {"type"}):
        check_text(name, fields.get(name))


def check_text(name, text):
    """Raise ValueError, with a sentence for the client, if this is not a proper nick, message or id."""
    if name not in LENGTHS:
        raise ValueError("Send no other fields than type, nick, message and id.")
    if not isinstance(text, str):
        raise ValueError(f"The {name} must be a text.")
    if len(text) > LENGTHS[name]:  # before the next check, which takes longer the longer the text is
        raise ValueError(f"The {name} has {len(text):,} characters.  At most {LENGTHS[name]:,} are allowed.")
    if all(unicodedata.category(character) in INVISIBLE for character in text):
        raise ValueError(f"The {name} must not be blank.")


# =================================================================================================
# Speed
#
# A WebSocket sends data in frames.  A frame is a header that says how long the data is, then the data.
# Tornado's write_message makes a new frame for each client, and a task that waits until it is sent.
# This part makes one frame for all clients and hands it to TCP itself, in half the time.  It also
# disconnects a client that has not read what it was sent for 20 seconds.  Its page will come back.
#
# The stream is Tornado's end of the TCP connection.  Its methods are documented, although write_to_fd
# is meant for subclasses.  ws_connection, which has the stream, is not.  If a later Tornado changes
# them, the part before this one does without.
# =================================================================================================

PATIENCE = 20  # seconds


class FastWSHandler(PublicWSHandler):
    """A client that is sent frames directly."""

    behind_since = None  # when TCP had no more room for this client, or None

    def open(self):
        self.set_nodelay(True)  # Without this, TCP may hold back a short frame, to send it together with the next one.
        super().open()

    def on_message(self, data):
        pause = super().on_message(data)
        # A client that does not read must not make the server keep one answer after the other.
        return gen.sleep(1) if pause and self.ws_connection.stream.writing() else pause

    def send(self, data):
        if self.is_gone():
            return
        stream, rest = self.ws_connection.stream, frame(data)
        if not stream.writing():  # TCP has taken all earlier frames, so this one is next.
            self.behind_since = None
            with contextlib.suppress(OSError):  # TCP has no room at all.  Or it is broken, which Tornado will notice.
                rest = rest[stream.write_to_fd(rest):]  # write_to_fd returns how many bytes TCP has taken
        if rest:
            stream.write(rest)  # Tornado keeps the rest until TCP has room.
            self.behind_since = self.behind_since or time.monotonic()
            if time.monotonic() - self.behind_since > PATIENCE:
                stream.close()


@functools.lru_cache(maxsize=1)  # broadcast sends the same data to all clients, and its frame is made once
def frame(data):
    """Return the WebSocket frame with this data in it (RFC 6455, section 5.2)."""
    # The first byte, 0x81, means: this is text, and all of it is in this frame.  Then comes the length.  Up to 125, it
    # takes one byte.  A greater length takes the number 126 and two bytes, or the number 127 and eight bytes.
    if len(data) < 126:
        header = bytes([0x81, len(data)])
    elif len(data) < 65536:
        header = bytes([0x81, 126]) + len(data).to_bytes(2, "big")
    else:
        header = bytes([0x81, 127]) + len(data).to_bytes(8, "big")
    return memoryview(header + data)  # A slice of a memoryview is no copy: slow clients share one frame.


# =================================================================================================
# How it starts
# =================================================================================================

HANDLERS = {cls.__name__: cls for cls in (WSHandler, CrowdWSHandler, ReliableWSHandler, PublicWSHandler, FastWSHandler)}
SETTINGS = {
    "websocket_ping_interval": 20,  # seconds.  Browsers answer a ping by themselves.  Who does not is disconnected.
    "websocket_max_message_size": 32 * 1024,  # bytes.  A client that sends more at once is disconnected.
    "compiled_template_cache": False,  # Tornado reads test.html for each visit, so that an edit needs no restart.
}


async def main():
    """Run the chat until Ctrl+C or the signal SIGTERM stops it."""
    options = command_line()
    app = make_app(HANDLERS[options.handler], **SETTINGS)
    # A client must send its request within 20 seconds.  No request here has a body.
    http_server = LimitedHTTPServer(app, idle_connection_timeout=20, max_body_size=0)
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
    http_server.stop()
    await goodbye()


def command_line():
    """Return the options that the script was started with: port, address, handler."""
    parser = argparse.ArgumentParser(description="ScopyChat, a realtime chat on WebSockets.")
    parser.add_argument("--port", type=int, default=8888, help="default: %(default)s")
    # To Tornado, an empty address means the whole network.
    parser.add_argument("--address", default="localhost", help="0.0.0.0 for all", type=lambda text: text or "localhost")
    parser.add_argument("--handler", default="FastWSHandler", choices=HANDLERS, help="the class for a client")
    options = parser.parse_args()
    if not 0 < options.port < 65536:
        parser.error("argument --port: a TCP port is a number from 1 to 65535")
    return options


class LimitedHTTPServer(httpserver.HTTPServer):
    """Tornado's HTTP server, but it hangs up on new clients while the process has too many files open.

    To the operating system, a connection is an open file, and a process may have only so many (`ulimit -n`).
    When they are all in use, Tornado cannot accept a connection, and tries again at once, without end.
    """

    def handle_stream(self, stream, address):  # Tornado calls this for each new connection.
        # Open files are numbered, and a new one gets the lowest free number.  So a high number means: many are open.
        limit = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1  # -1: no limit is known
        if 0 < limit - 16 < stream.socket.fileno():  # the last 16 are for other uses, such as test.html
            return stream.close()
        return super().handle_stream(stream, address)


async def goodbye():
    """Close all connections, and wait up to 2 seconds until the clients have agreed."""
    await asyncio.sleep(0.1)  # for what has arrived at this moment
    end = time.monotonic() + 2
    while connections and time.monotonic() < end:
        for con in connections:  # again and again, as a handshake may have ended meanwhile
            con.close(1001, "the server stops")  # 1001 means: going away (RFC 6455, section 7.4)
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    asyncio.run(main())  # 2012: IOLoop.instance().start().  Tornado now runs on asyncio's event loop.
