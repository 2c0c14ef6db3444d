"""Runs in a guest: sends ARGV[2] requests to port ARGV[1], and prints answers per second."""

import http.client
import sys
import time

port, count = map(int, sys.argv[1:])


def ask() -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/")
    connection.getresponse().read()
    connection.close()


ask()
began = time.perf_counter()
for _ in range(count):
    ask()
print(count / (time.perf_counter() - began))
