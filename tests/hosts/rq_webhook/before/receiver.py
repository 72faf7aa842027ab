"""The client's side: told of jobs, it prints what became of them."""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        payload = json.loads(body)
        job_id, status = payload["job_id"], payload["status"]
        error = payload.get("exc_info")
        self.send_response(204)
        self.end_headers()
        print(json.dumps([job_id, status, (error or "").strip().rpartition("\n")[2]]), flush=True)

    def log_message(self, *args):
        pass


HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
