# /// script
# requires-python = ">=3.11"
# dependencies = ["tornado>=6.6"]
# ///
"""ScopyChat: the realtime chat of the post "Websockets & Python3" (2012), on today's Tornado.

    pip install tornado
    python server.py        then open http://localhost:8888/ in two windows

The pieces of the post's server are here in the post's order, under the post's names.  A comment that starts
with "Post:" says what the post had in that place, and why it changed.

The script has four parts.  Part 1 is the whole chat.  Part 2 protects it from strangers, and part 3 makes it
fast: each adds to the class of the part before it, and you can skip both at first.  Part 4 starts the server.

The path of a message:  a browser -> on_message -> broadcast -> flush -> write_message -> every browser

A WebSocket carries texts, and here each text is a JSON object.  A client sends two kinds of them:

    {"type": "join", "nick": "Ann"}                             first
    {"type": "new_message", "message": "hi", "id": "k3j9x"}     whenever it has something to say

The server sends one kind: a list of what is new, and how many clients are online.  The first list that a client
gets is the history.

    {"type": "list", "data": [...], "online": 3}

The list has three kinds of entries.  An error goes only to the client that caused it.

    {"type": "message", "nick": "Ann", "message": "hi", "id": "k3j9x", "time": 1795350666.49}
    {"type": "notice", "message": "Ann joined", "time": 1795350666.49}
    {"type": "error", "message": "what was wrong", "id": "k3j9x"}

Why a message has an id: when a connection breaks, the client cannot know which of its messages arrived.  So it
connects again and sends them again, and by the id the server recognises those that it has already.
"""
import argparse
import asyncio
import contextlib
import functools
import json
import os
import secrets
import signal
import time

from tornado import gen, httpserver, ioloop, web, websocket

# =================================================================================================
# Part 1: the chat
# =================================================================================================

HISTORY = 100    # how many messages a new client gets
MEMORY = 10_000  # how many messages the server keeps, to recognise those that are sent again

connections = set()  # Post: a list, with a check before each append and each remove.  A set needs no checks.
messages = {}        # Post: a list, which grew for ever.  Now each message is under its id, the oldest first.
outbox = []          # New: what the server is about to send.


class MainHandler(web.RequestHandler):
    """Answers GET / with the page.  The page then opens the WebSocket."""

    def get(self):
        # Tornado puts these values in where test.html has {{ guest }}, {{ nonce }} and {{ history }}.  The guest's
        # name is an idea of the post's second server.  The nonce lets in the page's own scripts and styles, no others.
        self.render("test.html", guest=f"User{secrets.randbelow(101)}", nonce=secrets.token_urlsafe(), history=HISTORY)

    head = get  # HEAD asks for the headers alone, as monitors do.  Tornado does not send the page then.


class WSHandler(websocket.WebSocketHandler):
    """One client.  Tornado makes an object of this class for each connection to /chat.

    A WebSocket starts as an HTTP request that asks to change the protocol.  The server agrees with status 101.
    That exchange is the handshake.  The TCP connection stays open after it, and each side may send a text at
    any time.

    Tornado does the handshake, and then calls the methods here: open at the start, on_message for each text
    that the client sends, on_close at the end.
    """

    nick = None  # until the client joins

    def write_json(self, **kwargs):
        # Post: json.dumps(**kwargs).  That is a TypeError: dumps wants the dictionary, not its items.
        self.write_message(json.dumps(kwargs))

    def open(self):
        connections.add(self)
        # Post: type='message'.  Its page would have taken the list for one message, and shown "undefined".
        self.write_json(type="list", data=list(messages.values())[-HISTORY:], online=len(connections))

    def on_message(self, data):
        data = json.loads(data)
        if data["type"] == "join":
            self.nick = data["nick"]
            broadcast(type="notice", message=f"{self.nick} joined")
        elif data.get("id") in messages:
            # The client sends this message again, because its connection broke.  The answer says that it arrived.
            self.write_json(type="list", data=[messages[data["id"]]], online=len(connections))
        else:
            # Post: sent data on as it came, with whatever else a client had put in.  The post's page works here,
            # too: it never joins, but gives a nick with each message, and it makes no ids.
            broadcast(type="message", nick=self.nick or data["nick"], message=data["message"],
                      id=data.get("id") or secrets.token_urlsafe())

    def on_close(self):
        connections.discard(self)
        # Ann may still be here: with a second window, or with a new connection in place of this one.
        if self.nick and self.nick not in (con.nick for con in connections):
            broadcast(type="notice", message=f"{self.nick} left")


def broadcast(**message):
    """Put a message or a notice into the outbox, which flush will send to all.  Messages are kept, too."""
    # Post: for con in connections:
    #           messages.append(data)
    #           con.write_json(data)
    #
    # This kept the message once for each client, and write_json(data) is a TypeError: it takes keyword arguments.
    # With both mended, the loop works, but not in a crowd.  When 1,000 people say something at the same time, it
    # sends 1,000 messages to 1,000 people, one by one.  That is a million calls to the operating system.
    # So broadcast does not send.  It collects what comes in at the same time, and flush sends it all together.
    message = {"time": round(time.time(), 2), **message}
    if message["type"] == "message":
        messages[message["id"]] = message
        if len(messages) > MEMORY:
            del messages[next(iter(messages))]  # the oldest
    outbox.append(message)
    if len(outbox) == 1:  # it was empty, so nobody has asked for a flush yet
        asyncio.get_running_loop().call_soon(flush)


def flush():
    """Send all that is in the outbox to every client, as one text."""
    # Tornado runs in one thread, the event loop.  In each round, the loop asks the operating system what has
    # arrived, and calls the handlers for all of it; then it calls what call_soon was given.  So messages that
    # arrive together leave together: when 1,000 people speak at once, the server sends 1,000 texts with 1,000
    # messages in each.  A message that arrives alone leaves alone, at once.
    news, outbox[:] = outbox[:], []  # first: whatever fails below, the next message finds an empty outbox
    text = json.dumps({"type": "list", "data": news, "online": len(connections)})
    for con in connections:  # This set does not change meanwhile: Tornado calls on_close in a later round.
        with contextlib.suppress(websocket.WebSocketClosedError):  # this client is leaving
            con.write_message(text)


# =================================================================================================
# Part 2: among strangers.  You can skip it at first.  Among friends, part 1 is enough: in part 4,
# put WSHandler into the route, and httpserver.HTTPServer into main.
# =================================================================================================

LENGTHS = {"nick": 30, "message": 1000, "id": 64}  # how long each may be, in characters
LINES = 20    # how many lines a message may have
PAUSE = 0.02  # seconds that a client must wait after each text
# isprintable accepts these characters, but nobody sees them.
BLANK = {*" \u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0", *map(chr, range(0xfe00, 0xfe10))}


class PublicWSHandler(WSHandler):
    """A client that might send anything, and might send without end."""

    def on_message(self, data):
        fields = parse(data)
        try:
            check(fields, self.nick)
        except ValueError as problem:
            error = {"type": "error", "message": str(problem)}
            if isinstance(fields.get("id"), str):
                error["id"] = fields["id"]
            self.write_json(type="list", data=[error], online=len(connections))
        else:
            super().on_message(data)
        # Tornado waits for what on_message returns before it reads this client's next text.  Until then, the
        # client's texts stay in TCP's buffers.  When the buffers are full, TCP makes the client wait.  This is
        # called backpressure: a client that floods the room slows down itself, and nobody else.
        return gen.sleep(PAUSE)


def parse(text):
    """Return the JSON object in a client's text; an empty one if there is none."""
    with contextlib.suppress(ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        if isinstance(text, str) and isinstance(fields := json.loads(text), dict):  # a client can also send bytes
            return fields
    return {}


def check(fields, nick):
    """Raise ValueError, with a sentence for the client, if it may not send these fields.

    nick is the one that the client has joined with, or None.
    """
    if fields.get("type") == "join" and not nick:
        names = ["nick"]
    elif fields.get("type") == "new_message":
        names = ["message"] if nick else ["message", "nick"]
    else:
        raise ValueError('Send a JSON object with the type "new_message" or, once, "join".')
    for name in names + (["id"] if "id" in fields else []):
        check_text(name, fields.get(name))


def check_text(name, text):
    """Raise ValueError, with a sentence for the client, if a nick, message or id is not a proper text."""
    if not isinstance(text, str) or not any(map(visible, text)):
        raise ValueError(f"The {name} must be visible text.")
    if len(text) > LENGTHS[name]:
        raise ValueError(f"The {name} has {len(text):,} characters, and {LENGTHS[name]:,} is the most.")
    if name == "message" and len(text.splitlines()) > LINES:
        raise ValueError(f"The message has {len(text.splitlines()):,} lines, and {LINES} is the most.")
    # A nick with a line break could look like a notice, and one with an invisible character like another nick.
    if name == "nick" and (text != text.strip() or not all(sign == " " or visible(sign) for sign in text)):
        raise ValueError("The nick must not have invisible characters, or spaces at its ends.")


def visible(sign):
    """Return whether people see a character.  (This Python may not know the newest emoji, from U+1F000 on.)"""
    return sign not in BLANK and (sign.isprintable() or "\U0001f000" <= sign) and sign < "\U000e0000"


class LimitedHTTPServer(httpserver.HTTPServer):
    """Tornado's HTTP server, but it hangs up on new clients while the process has too many files open.

    To the operating system, a connection is an open file, and a process may have only so many (`ulimit -n`).
    When they are all in use, Tornado cannot accept a connection, and tries again at once, without end.
    """

    def handle_stream(self, stream, address):  # Tornado calls this for each new connection
        # Open files are numbered, and a new one gets the lowest free number.  So a high number means: many are
        # open.  The last 16 are for other uses, such as reading test.html.
        limit = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1  # -1: no limit is known
        if 0 < limit - 16 < stream.socket.fileno():
            return stream.close()
        return super().handle_stream(stream, address)


# =================================================================================================
# Part 3: speed.  You can skip it at first.  Without it, sending takes three times as long, and a
# client that sends answers to pings, but reads nothing, is never disconnected.
#
# A WebSocket sends each text in a frame: a header that says how long the text is, then the text.
# Tornado's write_message makes a new frame for each client, and a task that waits until the frame
# is sent.  This part makes one frame for all clients.  What TCP cannot take at once waits here, and
# is in memory once, however many clients wait for it.  For this, the part uses Tornado's end of the
# TCP connection, the stream.  Tornado documents what a stream can do; it does not document
# ws_connection, where the stream is found.  If a later Tornado changes that, use PublicWSHandler.
# =================================================================================================

PATIENCE = 20  # seconds for which a client may be behind before it is disconnected


class FastWSHandler(PublicWSHandler):
    """A client that gets a text quickly, and is disconnected if it does not read."""

    def open(self):
        self.set_nodelay(True)  # Without this, TCP may hold a short text back to send it with the next one.
        # waiting: the frames for which TCP has no room yet.  caught_up: when nothing was left to send last.
        self.waiting, self.caught_up = [], time.monotonic()
        super().open()

    def write_message(self, message):
        self.waiting.append(frame(message))
        self.send_waiting()

    def send_waiting(self):
        """Give TCP as many frames as it takes now."""
        if self.ws_connection is None or self.ws_connection.is_closing():
            return  # this client is leaving
        stream = self.ws_connection.stream
        while self.waiting and not stream.writing() and not stream.closed():
            data = self.waiting.pop(0)
            with contextlib.suppress(OSError):  # TCP has no room at all, or is broken, which Tornado will notice
                data = data[stream.write_to_fd(data):]  # write_to_fd returns how many bytes TCP has taken
            if data:  # Tornado sends it when there is room, and then calls send_waiting.
                stream.write(data).add_done_callback(lambda future: self.send_waiting())
        if not stream.writing():
            self.caught_up = time.monotonic()
        elif time.monotonic() - self.caught_up > PATIENCE:
            stream.close()


@functools.lru_cache(maxsize=1)  # flush sends one text to all clients: its frame is made once
def frame(text):
    """Return the WebSocket frame with this text in it (RFC 6455, section 5.2)."""
    payload = text.encode()
    # The first byte, 0x81, means: a text, and all of it is in this frame.  Then comes the size.  Up to 125 it
    # takes one byte.  A larger size takes the number 126 and two bytes, or the number 127 and eight.
    if len(payload) < 126:
        header = bytes([0x81, len(payload)])
    elif len(payload) < 65536:
        header = bytes([0x81, 126]) + len(payload).to_bytes(2, "big")
    else:
        header = bytes([0x81, 127]) + len(payload).to_bytes(8, "big")
    return memoryview(header + payload)  # A slice of a memoryview is no copy: slow clients share one frame.


# =================================================================================================
# Part 4: how it starts
# =================================================================================================

# Tornado disconnects a client that sends a text of more than 32 KiB.  It sends a ping to each client every 20 seconds,
# and disconnects one that has not answered when the next ping is due.
application = web.Application([
    (r"/", MainHandler),        # HTML chat homepage
    (r"/chat", FastWSHandler),  # WebSocket server; PublicWSHandler or WSHandler can stand here, too
], websocket_max_message_size=32 * 1024, websocket_ping_interval=20)

HEARTBEAT = 10  # seconds.  The page connects again when it has heard nothing for 20.


async def main():
    """Run the chat until Ctrl+C or the signal SIGTERM stops it."""
    options = command_line()
    # A client must send its request within 20 seconds.  It may announce a body, but none is accepted.
    http_server = LimitedHTTPServer(application, max_body_size=0, idle_connection_timeout=20, body_timeout=20)
    try:
        http_server.listen(options.port, options.address)  # Post: listen(8888), which let in the whole network
    except (OSError, UnicodeError) as error:
        raise SystemExit(f"Cannot listen on {options.address}, port {options.port}: {error}")
    # When a network dies, nobody tells the page, and a page does not see pings.  So the server sends a list every
    # 10 seconds, even an empty one.  A page that gets none knows that it must connect again.
    ioloop.PeriodicCallback(flush, HEARTBEAT * 1000).start()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for signum in signal.SIGINT, signal.SIGTERM:  # SIGINT is Ctrl+C
        with contextlib.suppress(NotImplementedError):  # On Windows, Ctrl+C ends the script without a goodbye.
            loop.add_signal_handler(signum, stop.set)
    host = f"[{options.address}]" if ":" in options.address else options.address
    print(f"ScopyChat is open at http://{host}:{options.port}/ (Ctrl+C closes it)", flush=True)
    await stop.wait()
    http_server.stop()
    await goodbye()


def command_line():
    """Return the options that the server was started with."""
    parser = argparse.ArgumentParser(description="ScopyChat, a realtime chat on WebSockets.")
    parser.add_argument("--port", type=int, default=8888, help="default: %(default)s")
    # For Tornado, an empty address would mean the whole network.
    parser.add_argument("--address", default="localhost", help="0.0.0.0 for all", type=lambda text: text or "localhost")
    options = parser.parse_args()
    if not 0 < options.port < 65536:
        parser.error("argument --port: a TCP port is a number from 1 to 65535")
    return options


async def goodbye():
    """Send what has arrived, close all connections, and wait up to 2 seconds for the clients' answers."""
    await asyncio.sleep(0.1)  # Texts that have arrived already go through on_message and flush meanwhile.
    end = time.monotonic() + 2
    while connections and time.monotonic() < end:
        for con in connections:  # each time, as somebody whose handshake had begun may have come in
            con.close(1001, "the server stops")  # 1001 means: going away (RFC 6455, section 7.4)
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    asyncio.run(main())  # Post: IOLoop.instance().start().  Tornado runs on Python's own event loop now.
