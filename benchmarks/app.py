"""What every measured guest runs: an HTTP server on port 80 that answers the guest's hostname.

Runs in the guest, from its command line (setup.py). Not here: asking it (answers.py).
"""

import http.server
import json
import socket


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers any path."""

    def do_GET(self) -> None:
        """Say who this guest is."""
        body = json.dumps({"name": socket.gethostname()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing on the console."""

    def address_string(self) -> str:
        """No look-up of names."""
        return str(self.client_address[0])


class Server(http.server.ThreadingHTTPServer):
    """One that does not ask the name server for its own name, as HTTPServer does."""

    def server_bind(self) -> None:
        """Bind, and nothing else."""
        self.socket.bind(self.server_address)


Server(("", 80), Handler).serve_forever(poll_interval=86400)
