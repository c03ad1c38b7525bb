"""Receives webhooks, checks who sent them, does each event once: WEBHOOK_SECRET=whsec_... python FILE [PORT]."""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks import Webhook

signed = Webhook(os.environ["WEBHOOK_SECRET"])
done: set[str] = set()  # in earnest: a table with a unique column, in the transaction that does the work


class Hooks(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            signed.verify(body, dict(self.headers))
        except Exception:  # garbage makes several kinds of errors
            return self.answer(401)
        event = json.loads(body)
        if self.headers["webhook-id"] not in done:  # it may come more than once
            done.add(self.headers["webhook-id"])
            print(event["type"], json.dumps(event["data"]), flush=True)
        self.answer(204)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 9000), Hooks).serve_forever()
