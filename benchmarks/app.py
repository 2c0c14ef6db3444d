"""The application of every measured guest: an HTTP server that answers with its hostname.

Runs in the guest, from its command line (setup.py). Not here: asking it (answers.py).
"""

import http.server
import json
import socket


class Handler(http.server.BaseHTTPRequestHandler):
    """A handler for any path."""

    def do_GET(self) -> None:
        """Answer with the guest's hostname."""
        body = json.dumps({"name": socket.gethostname()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing on the console."""

    def address_string(self) -> str:
        """Return the address without a name look-up."""
        return str(self.client_address[0])


class Server(http.server.ThreadingHTTPServer):
    """A server that does not look up its own name, as HTTPServer does."""

    def server_bind(self) -> None:
        """Bind without a name look-up."""
        self.socket.bind(self.server_address)


Server(("", 80), Handler).serve_forever(poll_interval=86400)
