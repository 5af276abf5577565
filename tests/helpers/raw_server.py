"""A server of chat completions that writes what a test tells it, byte by byte, for servers that misbehave."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

from unweave.judge.client import ChatServer, Patience

KEY = "sk-vErY/secret+0123456789&abcdefghij"


def completion(text: Any = "fine", **more: Any) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], **more}).encode()


def http(status: str, body: bytes, *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "Connection: close", "", ""]).encode() + body


class Raw:
    """A server on this machine that writes ``says`` of (the request's number, the socket): what it returns is sent."""

    def __init__(self) -> None:
        self.says: Callable[[int, socket.socket], bytes] = lambda n, sock: http("200 OK", completion())
        self.requests: list[bytes] = []
        self.closed = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            if self.closed.is_set():
                sock.close()
                return
            self._threads.append(threading.Thread(target=self._one, args=(sock,)))
            self._threads[-1].start()

    def _one(self, sock: socket.socket) -> None:
        with sock:
            sock.settimeout(5)
            try:
                data = b""
                while b"\r\n\r\n" not in data:
                    data += self._more(sock)
                head, _, body = data.partition(b"\r\n\r\n")
                length = int(next(x for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")).split()[1])
                while len(body) < length:
                    body += self._more(sock)
                self.requests.append(head + b"\r\n\r\n" + body)
                sock.sendall(self.says(len(self.requests) - 1, sock))
            except OSError:
                pass

    def _more(self, sock: socket.socket) -> bytes:
        data = sock.recv(1 << 16)
        if not data:
            raise OSError("whoever asked is gone")
        return data

    def connect(self, **options: Any) -> ChatServer:
        waits = {name: options.pop(name) for name in Patience._fields if name in options}
        patience = Patience(**{"attempts": 3, "first_wait": 0.001, "timeout": 5.0, **waits})
        return ChatServer("m", self.url, key=KEY, patience=patience, **options)

    def close(self) -> None:
        self.closed.set()
        socket.create_connection(self._listening.getsockname()).close()  # wakes the one who accepts
        for thread in self._threads:
            thread.join()
        self._listening.close()


def leaks(text: str, key: str = KEY) -> bool:
    """Whether six letters of the key in a row stand in a text, by trying each."""
    return any(key[i : i + 6] in text for i in range(len(key) - 5))
