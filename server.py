# /// script
# requires-python = ">=3.11"
# dependencies = ["tornado>=6.6"]
# ///
"""ScopyChat: the realtime chat of the post "Websockets & Python3" (2012), on today's Tornado.

    pip install tornado
    python server.py        then open http://localhost:8888/ in two windows

The post's pieces stand here in the post's order, under the post's names.  A comment that starts with
"Post:" says what the post had in that place, and why it changed.

The path of a message:  a browser -> on_message -> broadcast -> flush -> send -> every browser

What the two sides send are JSON objects, each in one WebSocket frame:

    a client   {"type": "join", "nick": ...}              once, when it has connected
    a client   {"type": "new_message", "message": ...}    with an "id", and a "nick" if it never joined
    server     {"type": "list", "data": [...]}            the history, or several messages at once
    server     {"type": "message", "message": ...}        with "nick" and "id"; without, it is a notice
    server     {"type": "error", "message": ...}          to one client: why it was not heard
"""
import argparse
import asyncio
import json
import os
import random
import secrets
import signal
import struct
import sys
import time

from tornado import httpserver, ioloop, iostream, web, websocket

LENGTHS = {"nick": 30, "message": 1000, "id": 64}  # the most characters of each
HISTORY = 100            # messages that a newcomer is shown
PAUSE = 0.02             # seconds between two frames that are read from one client
HEARTBEAT = 10           # seconds between two signs of life to every page
PING = 20                # seconds between two pings to every client, and for its answer
MAX_MESSAGE = 16 * 1024  # bytes in a frame from a client; JSON may spell a character in 12

connections = set()  # Post: a list.  In a long list, finding the client that left takes long.
messages = {}        # Post: a list, which grew for ever.  Here: the history, each under its id.
outbox = []          # what has been said and not yet been sent


class MainHandler(web.RequestHandler):
    """Answers GET / with the page.  That is plain HTTP; the page then opens the WebSocket."""

    def get(self):
        # The page is a template: Tornado puts these values in where it has {{ nonce }} and so on.
        # From the post's second half: the server gives each guest a name.
        self.render("test.html", nonce=secrets.token_urlsafe(), guest=f"User{random.randint(0, 100)}",
                    lengths=LENGTHS, history=HISTORY)


class WSHandler(websocket.WebSocketHandler):
    """One client: Tornado makes one of these for each connection to /chat.

    A WebSocket starts as an HTTP request that asks for an upgrade.  This is the handshake: the server
    agrees with status 101, and from then on the TCP connection stays open and carries frames, small
    packets of text, both ways.  Either side may send one at any moment.  Tornado does the handshake
    and calls open, then on_message for each frame from the client, then on_close.

    A browser lets any web site open a WebSocket to us, but says which site it is (the Origin header).
    Tornado refuses all but our own page.
    """

    nick = None  # until the client joins.  The post's page never joins.

    def write_json(self, **kwargs):
        # Post: json.dumps(**kwargs).  dumps wants one object; this was a TypeError at every open.
        send(self, frame(**kwargs))

    def open(self):
        # TCP holds a small packet back while an earlier one is unconfirmed.  A chat cannot wait.
        self.set_nodelay(True)
        connections.add(self)
        # Post: type='message'.  The page took the list for one message and showed "undefined".
        self.write_json(type="list", data=list(messages.values()), online=len(connections))

    async def on_message(self, data):
        # Post: sent to everybody whatever came.  Any client could pretend to be the server.
        try:
            data = checked(data, self.nick)
            if data["type"] == "error":
                self.write_json(**data)
            elif data["type"] == "join":
                self.nick = data["nick"]
                broadcast(message=f"{self.nick} joined", online=len(connections))
            else:
                broadcast(**data)
        except Exception:  # a mistake in this script is not the client's fault: Tornado would close it
            self.log_exception(*sys.exc_info())
        # Tornado reads this client's next frame when on_message is done.  If the client sends faster
        # than that, its frames wait in TCP's buffers, and when those are full, it must wait itself.
        # This is backpressure: a client that floods us slows down itself and nobody else.
        await asyncio.sleep(PAUSE)

    def on_close(self):
        connections.discard(self)
        if self.nick:
            broadcast(message=f"{self.nick} left", online=len(connections))


# Post: for con in connections:
#           messages.append(data)     stored the message once for each client
#           con.write_json(data)      TypeError: write_json takes keywords only
#
# Mended, this loop is right, and slow in a crowd.  When 1,000 people speak at once, it sends each of
# their messages to each of them: a million frames, and each costs a call to the operating system.
#
# So a broadcast does not send.  It puts the message into the outbox.  A moment later flush sends all
# that has gathered there to each client in one frame: 1,000 frames, with the same million messages.
# The moment is a turn of the event loop: Tornado runs in one thread, which asks the system what has
# arrived, calls the handlers for all of it, and asks again.  What arrives together leaves together.


def broadcast(**said):
    """Say something to everybody, at the next turn of the event loop."""
    if not outbox:
        asyncio.get_running_loop().call_soon(flush)
    outbox.append({"type": "message", "time": round(time.time(), 2), **said})


def flush():
    """Send what is in the outbox to every client, and empty it."""
    said = []
    for message in outbox:
        if message.get("id") not in messages:  # a page that heard no answer says a message again
            said.append(message)
            if "id" in message:                # a notice has none; it is not kept
                messages[message["id"]] = message
    outbox.clear()
    while len(messages) > HISTORY:
        del messages[next(iter(messages))]     # the oldest
    if said:
        data = frame(**said[0]) if len(said) == 1 else frame(type="list", data=said)
        for con in connections:                # on_close never runs inside of send: the set stays as it is
            send(con, data)


def heartbeat():
    """Send every client an empty list, so that its page knows: the server is still there."""
    # TCP does not report that a network is dead.  The pings of the WebSocket protocol tell the server,
    # but a browser answers them without a word to the page.  The page needs frames that it can see.
    data = frame(type="list", data=[], online=len(connections))
    for con in connections:
        send(con, data)


application = web.Application(
    [
        (r"/", MainHandler),    # HTML chat homepage
        (r"/chat", WSHandler),  # WebSocket server
    ],
    template_whitespace="all",  # the page's source reaches the browser as it stands in the file
    websocket_max_message_size=MAX_MESSAGE,
    websocket_ping_interval=PING,  # a client that does not answer is closed
)


# =================================================================================================
# The chat is complete, and the rest can be skipped at first.  Below stands what it needs among
# strangers: what a client may say, how a frame is sent, what happens when there are too many
# clients, and how the server starts and stops.
# =================================================================================================


# ---- What a client may say ----------------------------------------------------------------------


def checked(data, nick):
    """Return what a client said, built from checked fields only; what is wrong with it, as an `error`.

    data: the frame as it came.  nick: the one that the client has joined with, or None.
    """
    answer = {"type": "error"}
    try:
        data = parsed(data)
        if "id" in data:
            answer["id"] = text(data, "id")
        match data.get("type"):
            case "join" if nick:
                raise ValueError("You have joined already.")
            case "join":
                return {"type": "join", "nick": text(data, "nick")}
            case "new_message":
                # A nick is what its client says.  It proves nothing: there are no accounts here.
                return {"type": "message", "id": answer.get("id") or secrets.token_urlsafe(9),
                        "nick": nick or text(data, "nick"), "message": text(data, "message")}
        raise ValueError('The type must be "join" or "new_message".')
    except ValueError as error:
        return {**answer, "message": str(error)}


def parsed(data):
    """Return the JSON object in a frame.  ValueError if there is none."""
    try:
        data = json.loads(data) if isinstance(data, str) else None  # bytes come from a binary frame
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        data = None
    if not isinstance(data, dict):
        raise ValueError("A frame must be text and hold one JSON object.")
    return data


def text(data, field):
    """Return a field of that object.  ValueError if it is missing, no text, blank or too long."""
    value = data.get(field)
    if field == "nick" and isinstance(value, str):
        value = value.strip()
    if not isinstance(value, str) or not value.strip() or len(value) > LENGTHS[field]:
        raise ValueError(f"The {field} must be text, of 1 to {LENGTHS[field]:,} characters.")
    return value


# ---- One frame for everybody --------------------------------------------------------------------


def frame(**data):
    """Return a WebSocket frame, as bytes, that holds this object as JSON (RFC 6455, section 5.2)."""
    payload = json.dumps(data).encode()
    # The first byte says: text, and this frame is the whole message.  Then comes the length: in one
    # byte if it is below 126; else 126 or 127 announces that 2 or 8 bytes follow with it.
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x81, size) + payload
    if size < 65536:
        return struct.pack("!BBH", 0x81, 126, size) + payload
    return struct.pack("!BBQ", 0x81, 127, size) + payload


MAX_UNREAD = 4 * 1024 * 1024  # bytes that wait for a client that does not read


def send(con, data):
    """Send a frame to one client, and do not wait: what TCP does not take now is sent later.

    The line `con.write_message(text)` could stand here instead, and nothing else would change.  But it
    makes the frame anew for each client, and a task that waits for it: three times the work.  This
    way Tornado documents too, all but the attribute `ws_connection`, which leads to the stream.
    """
    if con.ws_connection is None or con.ws_connection.is_closing():
        return  # after a close frame nothing may follow
    stream = con.ws_connection.stream
    try:
        if not stream.writing():  # nothing waits for this client, so this frame is next
            data = data[stream.write_to_fd(memoryview(data)):]
    except OSError:
        pass  # TCP's buffer is full, or the client is gone: the stream finds out which
    if data:
        stream.max_write_buffer_size = MAX_UNREAD
        try:
            stream.write(data)
        except iostream.StreamBufferFullError:
            stream.close()  # it does not read.  Its page will come back, and get the history.
        stream.max_write_buffer_size = None  # Tornado's own pings and close frames always find room


# ---- Too many clients ---------------------------------------------------------------------------

# Each client is an open file of this process, and the system allows only so many (`ulimit -n`).
MAX_FILES = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1  # -1: no limit is known


class LimitedHTTPServer(httpserver.HTTPServer):
    """Refuses a client when nearly all files are open.

    Without this, accept() would fail, the client would stay in the queue, and Tornado would try again
    at once, in an endless loop.
    """

    def handle_stream(self, stream, address):
        # The system gives a new file the lowest free number.  A high one means: few are left.
        if MAX_FILES < 0 or stream.socket.fileno() < MAX_FILES - 16:
            return super().handle_stream(stream, address)
        stream.write(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n"
                     b"Content-Length: 33\r\n\r\nThe room is full. Try again soon.")
        stream.close()


# ---- Start and stop -----------------------------------------------------------------------------

TIMEOUT = 20  # seconds for an HTTP request to arrive; without a limit, slow ones could take all files
GOODBYE = 2   # seconds for the clients to answer the goodbye


async def goodbye():
    """Close every connection, with a code and a reason that the page shows."""
    flush()
    deadline = time.monotonic() + GOODBYE
    while connections and time.monotonic() < deadline:
        for con in connections:  # in each round: there may be newcomers, in the middle of a handshake
            con.close(1001, "the server stops")
        await asyncio.sleep(0.05)


async def stop_signal():
    """Wait for SIGINT (Ctrl+C) or SIGTERM."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for signum in signal.SIGINT, signal.SIGTERM:
        try:
            loop.add_signal_handler(signum, stop.set)
        except NotImplementedError:  # on Windows
            signal.signal(signum, lambda *args: loop.call_soon_threadsafe(stop.set))
    await stop.wait()


async def main():
    """Run the chat, as the command line says, until a signal stops it."""
    parser = argparse.ArgumentParser(description="ScopyChat, a realtime chat on WebSockets.")
    parser.add_argument("--port", type=int, default=8888, help="default: %(default)s")
    parser.add_argument("--address", default="localhost", help="default: %(default)s, for this machine "
                        "only; 0.0.0.0 lets in everybody on the network")
    options = parser.parse_args()
    if not 0 < options.port < 65536:
        parser.error("argument --port: a TCP port is a number from 1 to 65535")
    http_server = LimitedHTTPServer(application, max_body_size=MAX_MESSAGE,
                                    idle_connection_timeout=TIMEOUT, body_timeout=TIMEOUT)
    try:
        http_server.listen(options.port, options.address)  # Post: 8888, open to the whole network
    except (OSError, UnicodeError) as error:
        sys.exit(f"Cannot listen on {options.address}, port {options.port}: {error}")
    print(f"ScopyChat is open at http://{options.address}:{options.port}/ (Ctrl+C closes it)", flush=True)
    ioloop.PeriodicCallback(heartbeat, HEARTBEAT * 1000).start()
    await stop_signal()
    http_server.stop()
    await goodbye()


if __name__ == "__main__":
    asyncio.run(main())  # Post: IOLoop.instance().start().  Tornado runs on Python's event loop now.
