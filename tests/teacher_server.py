"""A teacher for tests: an HTTP server on loopback that speaks the chat-completions protocol, and misbehaves as told."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-3f9a7c51e8"  # what OPENAI_API_KEY holds in tests


def converse(messages: list[dict]) -> str:
    """A reply that fits the prompts of this project, and depends on nothing but what is asked."""
    system, shown = messages[0]["content"], messages[-1]["content"].split("\n")
    if "Write the description and nothing else" in system:
        return f"The picture shows this: {shown[0]}\n\nThere is more to see: {shown[1]}"
    number = 1 if "Write one question" in system else 2
    blocks = [f"Question:\nWhat about part {i}?\n===\nAnswer:\nOne sees this: {shown[i]}" for i in range(number)]
    return "\n===\n".join(blocks)


class TeacherServer(ThreadingHTTPServer):
    """``with TeacherServer() as server:`` answers at ``server.url``.

    answer: messages -> the text of a reply.
    script: (messages, how often they were asked before) -> what to do: "answer", "delay 0.5", "drop", "429", "429 2"
        (with Retry-After), "500", any other status, "cut JSON", "half" (of the announced bytes), "page" (HTML), "deep"
        (JSON nested without end), "parts" (content that is no text), "words" (tokens that are no numbers), "empty",
        "nothing" (no choices), "separators", "length", "content_filter", or "echo" (the key comes back).
    before: called with the messages as soon as they are there.
    asked: how often the same messages came, by their JSON; at_once: the most that were under way at a time.
    """

    daemon_threads = True
    request_queue_size = 200

    def __init__(
        self,
        answer: Callable[[list[dict]], str] = converse,
        script: Callable[[list[dict], int], str] = lambda messages, before: "answer",
        before: Callable[[list[dict]], None] = lambda messages: None,
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.script, self.before = answer, script, before
        self.asked, self.times, self.bodies = Counter(), [], []
        self.lock, self.under_way, self.at_once, self.keys = threading.Lock(), 0, 0, set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> "TeacherServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        messages = body["messages"]
        name = json.dumps(messages)
        with server.lock:
            server.under_way += 1
            server.at_once = max(server.at_once, server.under_way)
            times, server.asked[name] = server.asked[name], server.asked[name] + 1
            server.times.append(time.monotonic())
            server.bodies.append(body)
            server.keys.add(self.headers.get("Authorization", ""))
        try:
            server.before(messages)
            self.act(server.script(messages, times), messages)
        finally:
            with server.lock:
                server.under_way -= 1

    def act(self, action: str, messages: list[dict]) -> None:
        what, _, number = action.partition(" ")
        text = self.server.answer(messages)
        if what == "delay":
            time.sleep(float(number))
        if what == "drop":
            self.close_connection = True
            self.connection.close()
        elif what.isdigit():
            self.refuse(int(what), number)
        elif what == "page":
            self.send(200, "<html>Welcome to the proxy</html>", "text/html")
        elif what == "deep":
            self.send(200, "[" * 200_000)
        elif what in ("parts", "words"):
            answer = json.loads(self.completion(messages, text, "stop"))
            if what == "parts":
                answer["choices"][0]["message"]["content"] = [{"type": "text", "text": text}]
            else:
                answer["usage"] = {"prompt_tokens": "12", "completion_tokens": -3.5}
            self.send(200, json.dumps(answer))
        elif what == "nothing":
            self.send(200, json.dumps({"object": "chat.completion", "choices": []}))
        else:
            text = {
                "empty": "",
                "separators": text.replace("===", "---"),
                "echo": f"{text} {self.headers.get('Authorization')}",
            }.get(what, text)
            answer = self.completion(messages, text, what if what in ("length", "content_filter") else "stop")
            self.send(200, answer[: len(answer) // 2] if what == "cut" else answer, half=what == "half")

    def completion(self, messages: list[dict], text: str, reason: str) -> str:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        words = sum(len(message["content"].split()) for message in messages), len(text.split())
        usage = {"prompt_tokens": words[0], "completion_tokens": words[1], "total_tokens": sum(words)}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "loopback"}
        return json.dumps(head | {"choices": [choice], "usage": usage})

    def refuse(self, status: int, number: str) -> None:
        """An error as the official service words it; with status 401 it tells half of the key."""
        told = f"Refused on purpose, said to {self.headers.get('Authorization')}"
        error = {"message": told, "type": "error", "param": None, "code": number if number.isidentifier() else None}
        if number == "max_completion_tokens":
            error["message"] = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        wait = {"Retry-After": number} if number and not number.isidentifier() else {}
        self.send(status, json.dumps({"error": error}), headers=wait)

    def send(
        self, status: int, text: str, kind: str = "application/json", half: bool = False, headers: dict | None = None
    ) -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self.close_connection = True
