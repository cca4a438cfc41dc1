# /// script
# requires-python = ">=3.11"
# dependencies = ["tornado>=6.5"]
# ///
"""ScopyChat: the realtime chat of the post "Websockets & Python3" (2012), on today's Tornado.

    pip install tornado
    python server.py        then open http://localhost:8888/ in two windows

Read it beside the post: the post's pieces stand here in its order, under its names.  A comment that
starts with "Post:" says what the post had there and why it changed.  Between WSHandler and the
application come three sections that it lacks; on_message leads there.
"""
import argparse
import asyncio
import collections
import json
import logging
import os
import random
import secrets
import signal
import sys
import time

from tornado import httpserver, iostream, netutil, web, websocket

# ---- Limits: one for whatever a stranger could make long, many or late -------------------------

LENGTHS = {"nick": 30, "message": 1000, "id": 64}  # characters, from 1 to this many
HISTORY = 100             # messages that a newcomer is shown
MAX_MESSAGE = 8 * 1024    # bytes from a client, in a WebSocket message or the body of a request
MAX_FLUSH = 256 * 1024    # bytes to a client in one frame; the last line may go beyond
MAX_UNREAD = 1024 * 1024  # bytes that wait for a client which does not read
PACE = 512 * 1024         # bytes a second to each client, while any of them falls behind
PATIENCE = 20             # seconds from ping to ping, for the answer, and for an HTTP request
GOODBYE = 2               # seconds for all clients to leave when the server stops
# Each client is an open file, and the system grants a process so many (`ulimit -n`).  We keep some.
FILES = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1
MAX_FILES = FILES - 16 if FILES > 0 else sys.maxsize

# ---- The room ----------------------------------------------------------------------------------

connections = set()  # Post: a list; the longer it is, the longer it takes to find who has left.
messages = collections.deque(maxlen=HISTORY)  # Post: a list, which grew until memory was full.


class MainHandler(web.RequestHandler):
    """Serves the page, over plain HTTP.  The page then opens the WebSocket."""

    def get(self):
        # The browser runs only jQuery and what carries this page's nonce, and connects only to us:
        # should markup from a message ever get into the page, it stays dead.
        nonce = secrets.token_urlsafe()
        self.set_header(
            "Content-Security-Policy",
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}' "
            "https://code.jquery.com/jquery-4.0.0.min.js; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        self.set_header("Connection", "close")  # the one that the page needs is its WebSocket
        # A name for a guest, put into the page by the server: from the post's second half.
        self.render("test.html", nonce=nonce, guest=f"User{random.randint(0, 100)}",
                    lengths=LENGTHS, history=HISTORY)


class WSHandler(websocket.WebSocketHandler):
    """One client, from its handshake until one side closes the connection.

    A WebSocket begins as a GET request with `Upgrade: websocket`.  Tornado answers it with status
    101, and from then on both sides send frames over the same TCP connection, whenever they like.
    A browser lets any site's page open one, but names that site as the `Origin`; if it is not our
    own, Tornado answers 403 instead.  Tornado calls open, on_message and on_close.
    """

    nick = None  # of a client that has joined; the post's page never does

    def write_json(self, **kwargs):
        # Post: json.dumps(**kwargs), which takes no such keywords: a TypeError at the first frame.
        self.write_frame(frame(encode(kwargs)))

    def write_frame(self, data):
        """Send a frame.  Returns whether the client has fallen behind: TCP did not take all."""
        # Post: write_message, Tornado's own.  For each client it makes the frame anew, and a task
        # that waits for it to be written.  A broadcast has one frame for all, and waits for nobody.
        if self.ws_connection is None or self.ws_connection.is_closing():
            return False  # after its close frame a side may send no other (RFC 6455, 5.5.1)
        stream = self.ws_connection.stream
        try:
            if not stream._write_futures:  # nothing is queued (writing() takes four times as long)
                data = data[stream.socket.send(data):]
                if not data:
                    return False
        except OSError:
            pass  # TCP's buffer is full, or the client is gone; for the stream to find out
        try:
            stream.max_write_buffer_size = MAX_UNREAD
            stream.write(data)  # what is left is queued until TCP takes it ...
            stream.max_write_buffer_size += 1024  # room for Tornado's pings and close frames
        except iostream.StreamBufferFullError:
            stream.close()  # ... but not without end.  The page comes back and gets the history.
        return True

    def open(self):
        self.set_nodelay(True)  # else TCP holds a small frame until the last one is acknowledged
        connections.add(self)
        # Post: type='message'; its page took the list for one message, and showed "undefined".
        self.write_json(type="list", data=list(messages), online=len(connections))

    async def on_message(self, data):
        # Post: relayed whatever came, and stored it in the loop, once for each client.
        if self.ws_connection is None:
            return  # this client was sent a close frame; what was on its way comes too late
        # A client XORs each frame with four random bytes, the mask, so that a script cannot put
        # chosen bytes on the wire (RFC 6455, 5.1 and 10.3).  Tornado keeps the last mask and does
        # not insist on one; we do, and take it away each time.
        if self.ws_connection._frame_mask is None:
            return self.close(1002, "a client must mask its frames")
        self.ws_connection._frame_mask = None
        try:
            data = parse(data)
            match data.get("type"):
                case "join":
                    if self.nick:
                        raise ValueError("You have joined already.")
                    self.nick = text(data, "nick")
                    said = line(f"{self.nick} joined", online=len(connections))
                case "new_message":
                    # Made anew of checked fields: nothing else in the frame gets to the others.
                    # The nick is as in the post what the client says it is: no proof of identity.
                    id = text(data, "id") if "id" in data else secrets.token_urlsafe(9)
                    said = line(text(data, "message"), id=id, nick=text(data, "nick"))
                case _:
                    raise ValueError('The "type" must be "join" or "new_message".')
            # Tornado reads this client's next frame when we return, and that is after the flush.
            # What the client sends meanwhile fills TCP's buffers, and then it has to wait:
            # backpressure.  So whoever floods the room gets one line into a flush, like everybody.
            await broadcast(said)
        except ValueError as error:
            self.write_json(type="error", message=str(error))

    def on_close(self):
        connections.discard(self)
        if self.nick:
            broadcast(line(f"{self.nick} left", online=len(connections)))


# ---- What a client may say ---------------------------------------------------------------------


def parse(data):
    """Return the JSON object in a frame.  ValueError, in words for its sender, if there is none."""
    try:
        data = json.loads(data) if isinstance(data, str) else None  # bytes: a binary frame
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        data = None
    if not isinstance(data, dict):
        raise ValueError("A frame must be text, and hold one JSON object.")
    return data


def text(data, field):
    """Return a field of that object.  ValueError, in words for its sender, if it is no good."""
    value = data.get(field)
    if field == "nick" and isinstance(value, str):
        value = value.strip()
    if not isinstance(value, str) or not value.strip() or len(value) > LENGTHS[field]:
        raise ValueError(f'The "{field}" must be text, 1 to {LENGTHS[field]:,} characters long '
                         "and not all blanks.")
    return value


# ---- What the server says ----------------------------------------------------------------------


def line(message, **more):
    """Return a line of the chat: with a nick and an id somebody's message, without, a notice."""
    return {"type": "message", "message": message, "time": round(time.time(), 2), **more}


def encode(data):
    """Return JSON in UTF-8, which is what a text frame holds."""
    # JSON can spell half of a character ("\ud800"), which UTF-8 cannot: it becomes a "?".
    return json.dumps(data, ensure_ascii=False).encode(errors="replace")


def frame(payload):
    """Return the frame for a text in UTF-8 (RFC 6455, 5.2)."""
    # 0x81: this is text, and the last frame of its message.  The length follows: in one byte if it
    # is below 126, else in 2 or 8 bytes, announced by 126 or 127.  A server does not mask.
    size = len(payload)
    if size < 126:
        length = bytes([size])
    elif size < 65536:
        length = bytes([126]) + size.to_bytes(2, "big")
    else:
        length = bytes([127]) + size.to_bytes(8, "big")
    return b"\x81" + length + payload


# ---- A broadcast is a flush --------------------------------------------------------------------
#
# Post: on_message wrote each message to each client (with con.write_json(data): another TypeError).
# When 1,000 people speak at once, that is a million frames, each a call to the operating system.
# Here a line goes to the outbox; a moment later all that has gathered there leaves as one frame,
# the same for everybody.  That is a thousand frames, with the same million lines in them.

outbox = collections.deque()
flushing = None  # the task that empties the outbox


def broadcast(said):
    """Put a line into the outbox.  Returns an awaitable: done when everybody was written to."""
    global flushing
    if flushing is None or flushing.done():
        flushing = asyncio.ensure_future(flush_soon())
    outbox.append(said)
    return flushing


async def flush_soon():
    while outbox:
        # Lines that came while the last flush was writing are here together, and more may be on the
        # way: from its socket to the outbox a line takes some three turns of the event loop (the
        # socket is found readable, the frame is read, on_message runs).  Wait for them, and they
        # all leave together.  A lone line leaves at once.
        for _ in range(3 if len(outbox) > 1 else 0):
            await asyncio.sleep(0)
        # Whoever falls behind on a slow network has a moment to catch up; those who flood the room
        # wait for it as well, and nobody else can tell.
        if behind := flush():
            await asyncio.sleep(behind / PACE)


def flush():
    """Write the outbox to every client in one frame, or as much of it as a frame may hold.

    Returns the size of the lines in bytes if some client has fallen behind, else 0.
    """
    lines, size, behind = [], 0, 0
    while outbox and size < MAX_FLUSH:
        said = outbox.popleft()
        if "id" in said:
            if any(said["id"] == known["id"] for known in messages):
                continue  # a page says it again when its connection broke before it saw it here
            messages.append(said)  # not before: who joins now gets it once, not twice
        lines.append(encode(said))
        size += len(lines[-1])
    if lines:
        several = b'{"type": "list", "data": [%b]}' % b", ".join(lines)
        data = frame(several if len(lines) > 1 else lines[0])
        for con in connections:
            if con.write_frame(data):
                behind = size
    return behind


application = web.Application(
    [
        (r"/", MainHandler),    # HTML chat homepage
        (r"/chat", WSHandler),  # WebSocket server
    ],
    template_path=os.path.dirname(os.path.abspath(__file__)),
    template_whitespace="all",  # the page's source is there to be read
    websocket_max_message_size=MAX_MESSAGE,
    websocket_ping_interval=PATIENCE,  # finds who vanished without a word
)


class LimitedHTTPServer(httpserver.HTTPServer):
    """Refuses newcomers when files run short.  Else accepting them would fail, without end."""

    def handle_stream(self, stream, address):
        # The system gives each open file a number, the lowest that is free.  So a high one tells
        # that nearly all are taken, by whatever.
        if stream.socket.fileno() < MAX_FILES:
            return super().handle_stream(stream, address)
        stream.write(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n"
                     b"Content-Length: 33\r\n\r\nThe room is full. Try again soon.")
        stream.close()


def ours(record):
    """Return whether a record in Tornado's log is about an error that came through this script.

    The others are about requests, good and bad ones, with which strangers could fill the disk.
    """
    _, error, traceback = record.exc_info or (None, None, None)
    while traceback and traceback.tb_frame.f_globals is not globals():
        traceback = traceback.tb_next
    return traceback is not None and not isinstance(error, asyncio.CancelledError)


for name in "access", "application", "general":
    logging.getLogger(f"tornado.{name}").addFilter(ours)


async def main():
    """Run the chat, as the command line says, until SIGINT (Ctrl+C) or SIGTERM."""
    parser = argparse.ArgumentParser(description="ScopyChat, a realtime chat on WebSockets.")
    parser.add_argument("--port", type=int, default=8888, help="default: %(default)s")
    parser.add_argument("--address", default="localhost", help="where to listen; "
                        "default: %(default)s, for this machine only; 0.0.0.0 is for everybody")
    options = parser.parse_args()  # Post: listened on 8888, on every network of the machine
    if not 0 <= options.port < 65536:
        parser.error("argument --port: a TCP port is a number from 0 to 65535")
    http_server = LimitedHTTPServer(application, idle_connection_timeout=PATIENCE,
                                    body_timeout=PATIENCE, max_body_size=MAX_MESSAGE)
    try:
        sockets = netutil.bind_sockets(options.port, options.address)
    except (OSError, UnicodeError) as error:
        sys.exit(f"server.py: cannot listen on {options.address}, port {options.port}: {error}")
    http_server.add_sockets(sockets)

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, lambda *args: loop.call_soon_threadsafe(stop.set))
    host = f"[{options.address}]" if ":" in options.address else options.address
    print(f"ScopyChat is open at http://{host}:{sockets[0].getsockname()[1]}/ (Ctrl+C closes it)",
          flush=True)
    await stop.wait()

    http_server.stop()
    while outbox:
        flush()
    for con in connections:
        con.close(1001, "the server stops")  # a client answers with a close frame of its own
    deadline = loop.time() + GOODBYE
    while connections and loop.time() < deadline:
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    # Post: IOLoop.instance().start().  Tornado runs on Python's own event loop now.
    asyncio.run(main())
