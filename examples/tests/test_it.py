"""A test suite for the tutorial: it passes on hosts that are called hello-..."""

import socket
import unittest


class Host(unittest.TestCase):
    def test_its_name(self) -> None:
        self.assertTrue(socket.gethostname().startswith("hello-"))
