"""An OpenAI-compatible server of the standard library, for the random driver."""

import hashlib
import http.server
import json
import random
import threading


class Server(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible server whose answer depends on the prompt alone; one request in ten fails at first."""

    daemon_threads = True

    class RequestHandlerClass(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def _send(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "teacher"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            if random.random() < 0.1:
                return self._send(503, {"error": "busy"})
            text = " ".join(hashlib.sha256(prompt.encode()).hexdigest())
            message = {"role": "assistant", "content": text}
            usage = {"prompt_tokens": len(prompt), "completion_tokens": 9}
            self._send(200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()
