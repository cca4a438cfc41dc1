# /// script
# requires-python = ">=3.11"
# dependencies = ["tornado>=6.6"]
# ///
"""ScopyChat: the realtime chat of the post "Websockets & Python3" (2012), on today's Tornado.

    pip install tornado
    python server.py        then open http://localhost:8888/ in two windows

The post's pieces stand here in its order, under its names.  A comment that starts with "Post:" says
what the post had in that place, and why it changed.

The path of a message:  a browser -> on_message -> broadcast -> flush -> send -> every browser

Both sides send text, and each text is a JSON object:

    a client    {"type": "join", "nick": ...}            once, at the start (the post's page does not)
                {"type": "new_message", "nick": ..., "message": ..., "id": ...}
    the server  {"type": "message", "id": ..., "nick": ..., "message": ..., "time": ...}
                    somebody said this
                {"type": "message", "message": "Ann joined", "time": ..., "online": 3}
                    a notice, and how many are online now
                {"type": "list", "data": [...], "online": 3}    first of all, the history
                {"type": "list", "data": [], "online": 3}       every 10 seconds: a sign of life
                {"type": "list", "data": [...]}                 several messages and notices at once
                {"type": "error", "message": ..., "id": ...}
                    to one client: what was wrong with its text, and the id in it, if there was one
"""
import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import signal
import struct
import sys
import time

from tornado import gen, httpserver, ioloop, iostream, web, websocket

LENGTHS = {"nick": 30, "message": 1000, "id": 64}  # the most characters of each; the least is 1
HISTORY = 100  # the last messages, which a newcomer is shown
PAUSE = 0.02   # seconds that a client must wait after each text before we read its next one

connections = set()  # Post: a list.  To find the client that left, Python had to search through it.
messages = {}        # Post: a list, which grew for ever.  Now the last ones only, each under its id.
outbox = []          # New: what has been said and is about to be sent.


class MainHandler(web.RequestHandler):
    """Answers GET / with the page.  That is plain HTTP; the page then opens the WebSocket."""

    def get(self):
        # test.html is a template: where it has {{ nonce }}, Tornado puts in the value of nonce.  The nonce
        # is explained there.  guest is a nick to start with, as in the post's second version, on CherryPy.
        self.render("test.html", nonce=secrets.token_urlsafe(), guest=f"User{random.randint(0, 100)}",
                    lengths=LENGTHS, history=HISTORY)


class WSHandler(websocket.WebSocketHandler):
    """One client.  Tornado makes an object of this class for each connection to /chat.

    A WebSocket starts as an HTTP request that asks for an upgrade.  The server agrees with status 101.
    That was the handshake; the TCP connection then stays open, and either side may send a text at any
    time.  Each text travels in a frame: a few bytes that tell its length, and then the text.

    Tornado does the handshake.  It calls open when it is done, on_message for each text that comes,
    and on_close at the end.  A browser lets any web site connect to us, but says which one it is (in
    the header Origin); Tornado refuses all sites but our own.
    """

    nick = None  # until this client joins

    def write_json(self, **kwargs):
        # Post: write_message(json.dumps(**kwargs)).  That is a TypeError, as dumps takes an object, and not
        # its fields.  write_message would do; "Frames", below, tells why send stands here in its place.
        send(self, frame(json.dumps(kwargs)))

    def open(self):
        self.set_nodelay(True)  # else TCP delays a short text until the client has confirmed the last one
        connections.add(self)
        # Post: type='message'.  Its page took the list for one message, and showed "undefined".
        self.write_json(type="list", data=list(messages.values()), online=len(connections))

    def on_message(self, data):
        if closing(self):
            return None  # The client has vanished.  Tornado still reads out what had come from it.
        # Post: sent on whatever came.  Here checked turns the text into a dictionary that has a type, and
        # only such fields as belong to it.  If the text breaks a rule, that type is "error".
        try:
            data = checked(data, self.nick)
            if data["type"] == "error":
                self.write_json(**data)
            elif data["type"] == "join":
                self.nick = data["nick"]
                broadcast(type="message", message=f"{self.nick} joined", online=len(connections))
            else:
                broadcast(**data)
        except Exception:  # a mistake in this script: log it.  Tornado would also close the connection.
            self.log_exception(*sys.exc_info())
        # Tornado waits until this is over, and then reads this client's next text.  What the client sends
        # until then waits in TCP's buffers; when they are full, the client itself has to wait.  This is
        # backpressure: a client that floods the room slows down nobody but itself.
        return gen.sleep(PAUSE)

    def on_close(self):
        connections.discard(self)
        if self.nick:
            broadcast(type="message", message=f"{self.nick} left", online=len(connections))


# Post: for con in connections:
#           messages.append(data)     stored the message once for each client
#           con.write_json(data)      a TypeError: write_json takes keywords
#
# With that mended, the loop works, but not in a crowd.  When 1,000 people speak at once, it sends each
# of their messages to each of them: a million frames, and each is a call to the operating system.
#
# So broadcast does not send.  It puts the message into the outbox.  A moment later, flush sends all that
# is in there to each client, as one frame.  That is 1,000 frames, each with 1,000 messages in it.
#
# The moment is one turn of the event loop.  Tornado runs in a single thread, which goes round and
# round: ask the operating system what has arrived, call the handlers for all of it, then whatever
# call_soon was given.  So what arrived together leaves together, and a lone message leaves at once.


def broadcast(**said):
    """Say something to everybody, a moment later."""
    if not outbox:  # else flush is on its way already
        asyncio.get_running_loop().call_soon(flush)
    outbox.append({"time": round(time.time(), 2), **said})


def flush():
    """Send all that is in the outbox to every client, as one frame."""
    news = []
    for said in outbox:
        if "id" in said:  # a notice has none, and the history does not keep it
            if said["id"] in messages:
                continue  # a page was not sure whether its message had come, and has sent it again
            messages[said["id"]] = said
        news.append(said)
    outbox.clear()
    while len(messages) > HISTORY:
        del messages[next(iter(messages))]  # the oldest
    if news:
        text = json.dumps(news[0] if len(news) == 1 else {"type": "list", "data": news})
        data = frame(text)
        for con in connections:
            send(con, data)


HEARTBEAT = 10  # seconds


def heartbeat():
    """Send an empty list to every client.  main has Tornado call this every HEARTBEAT seconds."""
    # When a network dies, TCP does not notice.  Tornado sends pings to find such clients; but a browser
    # answers a ping without telling its page.  The page has to see something: then it knows that the
    # connection is alive, and when nothing comes, it connects again.
    data = frame(json.dumps({"type": "list", "data": [], "online": len(connections)}))
    for con in connections:
        send(con, data)


application = web.Application(
    [
        (r"/", MainHandler),    # HTML chat homepage
        (r"/chat", WSHandler),  # WebSocket server
    ],
    template_whitespace="all",  # send the page as it stands in the file, with its indentation
    websocket_max_message_size=16 * 1024,  # bytes.  In JSON, an emoji may be spelled in 12: \ud83d\ude00
    websocket_ping_interval=20,  # seconds.  A client that has not answered by the next ping is closed.
)


# =================================================================================================
# That is the chat.  What follows can be skipped at first: how on_message checks what a client says,
# how a text becomes a frame and is sent, what happens when there are too many clients, and how the
# server starts and stops.
# =================================================================================================


# ---- What a client may say ----------------------------------------------------------------------


def checked(text, nick):
    """Return what a client's text says, as a dictionary with a type and checked fields only.

    The type is "join", "message" or, if the text breaks a rule, "error".  nick is the one that the
    client has joined with, or None.
    """
    id = None
    try:
        data = parsed(text)
        if "id" in data:
            id = field(data, "id")
        if data.get("type") == "new_message":
            # A nick proves nothing.  There are no accounts, and anybody can say that he is Ann.
            return {"type": "message", "id": id or secrets.token_urlsafe(9),
                    "nick": nick or field(data, "nick"), "message": field(data, "message")}
        if data.get("type") != "join":
            raise ValueError('The type must be "join" or "new_message".')
        if nick:
            raise ValueError("You have joined already.")
        return {"type": "join", "nick": field(data, "nick")}
    except ValueError as error:
        answer = {"type": "error", "message": str(error)}
        return {**answer, "id": id} if id else answer


def parsed(text):
    """Return the JSON object in a text.  ValueError if there is none."""
    try:
        data = json.loads(text) if isinstance(text, str) else None  # a frame can also hold bytes
    except (ValueError, RecursionError):  # RecursionError: thousands of brackets within brackets
        data = None
    if not isinstance(data, dict):
        raise ValueError("Send text, and in it one JSON object.")
    return data


def field(data, name):
    """Return a field of a JSON object.  ValueError if it is missing, not text, blank or too long."""
    value = data.get(name)
    if name == "nick" and isinstance(value, str):
        value = value.strip()
    if not isinstance(value, str) or not value.strip() or len(value) > LENGTHS[name]:
        raise ValueError(f"The {name} must be text, with 1 to {LENGTHS[name]:,} characters.")
    return value


# ---- Frames -------------------------------------------------------------------------------------
#
# send(con, frame(text)) does what con.write_message(text) would do, which is Tornado's usual way.  But
# write_message makes a new frame for each client, and a task that waits until it is sent, and it does
# not notice a client that never reads.  flush makes the frame once, and sends it in a third of the time.


def frame(text):
    """Return the WebSocket frame that holds this text, in bytes (RFC 6455, section 5.2)."""
    payload = text.encode()
    size = len(payload)
    # 0x81 means: text, all in this one frame.  Then comes the length: one byte if it is below 126; else
    # the number 126 and two bytes, or 127 and eight.
    if size < 126:
        return struct.pack("!BB", 0x81, size) + payload
    if size < 65536:
        return struct.pack("!BBH", 0x81, 126, size) + payload
    return struct.pack("!BBQ", 0x81, 127, size) + payload


MAX_UNREAD = 4 * 1024 * 1024  # bytes that may wait for a client which does not read


def closing(con):
    """Return whether a connection is closed, or a close frame has been sent or has come."""
    return con.ws_connection is None or con.ws_connection.is_closing()


def send(con, data):
    """Send a frame to one client, and do not wait.  What TCP does not take now, Tornado sends later.

    This may close the connection, but it never calls on_close: Tornado does that in a later turn of
    the event loop.  So connections does not change while flush goes through it.
    """
    if closing(con):
        return  # after its close frame a side may send nothing more
    # The stream is Tornado's end of the TCP connection.  Tornado documents what a stream can do, but not
    # con.ws_connection, where it is found.  If that changes, con.write_message(text) can replace send.
    stream = con.ws_connection.stream
    behind = stream.writing()  # an earlier frame is still waiting; this one must queue up behind it
    data = memoryview(data)  # its slices share its bytes, so a frame that waits for many is there once
    if not behind:
        with contextlib.suppress(OSError):  # TCP takes nothing now, or the client is gone
            data = data[stream.write_to_fd(data):]  # what is left, after what TCP took
    if data:
        # Leave the rest to Tornado.  A client that lets more than MAX_UNREAD wait does not read, and is
        # cut off.  The limit holds for this write alone: a ping that Tornado sends must not fail by it.
        stream.max_write_buffer_size = MAX_UNREAD if behind else None
        try:
            stream.write(data)
        except iostream.StreamBufferFullError:
            stream.close()
        stream.max_write_buffer_size = None


# ---- Too many clients ---------------------------------------------------------------------------

# Each connection is an open file of this process.  The system allows so many (see `ulimit -n`).
MAX_FILES = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1  # -1: no limit is known
SPARE = 16  # files for all else, such as reading test.html


class LimitedHTTPServer(httpserver.HTTPServer):
    """Tornado's HTTP server, which here refuses a client when nearly all files are open.

    Without this, Tornado could not accept the client.  It would try again at once, in an endless loop,
    and log each failure.
    """

    def handle_stream(self, stream, address):  # Tornado calls this for each new connection
        # The system numbers open files, and a new one gets the lowest number that is free.
        if MAX_FILES < 0 or stream.socket.fileno() < MAX_FILES - SPARE:
            return super().handle_stream(stream, address)
        stream.write(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n"
                     b"Content-Length: 33\r\n\r\nThe room is full. Try again soon.")
        stream.close()


# ---- Start and stop -----------------------------------------------------------------------------

TIMEOUT = 20  # seconds until an HTTP request must be complete; else its connection is closed
GOODBYE = 2   # seconds until all clients must have left; else the server stops all the same


def stop_signal():
    """Return an event that SIGINT (Ctrl+C) or SIGTERM sets."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for signum in signal.SIGINT, signal.SIGTERM:
        try:
            loop.add_signal_handler(signum, stop.set)
        except NotImplementedError:  # on Windows
            signal.signal(signum, lambda *args: loop.call_soon_threadsafe(stop.set))
    return stop


async def goodbye():
    """Send what is in the outbox, then close all connections, with a code and a reason."""
    flush()
    deadline = time.monotonic() + GOODBYE
    while connections and time.monotonic() < deadline:
        for con in connections:  # in each round, as one whose handshake ends now comes in, too
            con.close(1001, "the server stops")  # when the client has answered, Tornado calls on_close
        await asyncio.sleep(0.05)


def command_line():
    """Return the options that the server was started with."""
    parser = argparse.ArgumentParser(description="ScopyChat, a realtime chat on WebSockets.")
    parser.add_argument("--port", type=int, default=8888, help="default: %(default)s")
    parser.add_argument("--address", default="localhost", help="default: %(default)s, which only this "
                        "machine can reach; with 0.0.0.0 the whole network can")
    options = parser.parse_args()
    if not 0 < options.port < 65536:
        parser.error("argument --port: a TCP port is a number from 1 to 65535")
    return options


async def main():
    """Run the chat until a signal stops it."""
    options = command_line()
    # No request for the page or for a handshake has a body, so none is accepted.
    http_server = LimitedHTTPServer(application, idle_connection_timeout=TIMEOUT, body_timeout=TIMEOUT,
                                    max_body_size=0)
    try:
        http_server.listen(options.port, options.address)  # Post: 8888, open to the whole network
    except (OSError, UnicodeError) as error:
        sys.exit(f"Cannot listen on {options.address}, port {options.port}: {error}")
    stop = stop_signal()
    host = f"[{options.address}]" if ":" in options.address else options.address
    print(f"ScopyChat is open at http://{host}:{options.port}/ (Ctrl+C closes it)", flush=True)
    ioloop.PeriodicCallback(heartbeat, HEARTBEAT * 1000).start()
    await stop.wait()
    http_server.stop()
    await goodbye()


if __name__ == "__main__":
    asyncio.run(main())  # Post: IOLoop.instance().start().  Tornado runs on Python's own loop now.
