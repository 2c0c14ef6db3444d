"""Answer each HTTP request with the name of this host."""

import socket
from http.server import BaseHTTPRequestHandler, HTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{socket.gethostname()}\n".encode())

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


HTTPServer(("", 80), Handler).serve_forever()
