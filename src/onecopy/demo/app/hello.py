"""The demo's application: an HTTP service that answers each request with the guest's hostname."""

import socket

server = socket.create_server(("", 80), backlog=64)
while True:
    connection, _ = server.accept()
    with connection:
        request = b""
        while b"\r\n\r\n" not in request:
            data = connection.recv(65536)
            if not data:
                break
            request += data
        body = socket.gethostname().encode() + b"\n"
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + body)
