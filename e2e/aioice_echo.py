"""Relays packets through a TURN server with aioice, and prints what came back.

aioice_echo.py HOST PORT udp|tcp|tls USER PASSWORD
"""

import asyncio
import socket
import ssl
import sys

from aioice import stun, turn

PACKETS = 200
SIZES = [1, 3, 100, 1200]


class Peer(asyncio.DatagramProtocol):
    """Sends back what it receives."""

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        self.transport.sendto(data, address)


class Client(asyncio.DatagramProtocol):
    """Keeps what comes back."""

    def __init__(self):
        self.received = asyncio.Queue()

    def datagram_received(self, data, address):
        self.received.put_nowait((data, address))


async def main(host, port, transport, user, password):
    loop = asyncio.get_running_loop()
    own = socket.gethostbyname(host)
    peer, _ = await loop.create_datagram_endpoint(Peer, local_addr=(own, 0))
    to = peer.get_extra_info("sockname")
    context = False
    if transport == "tls":
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for attempt in range(5):
        try:
            endpoint, client = await turn.create_turn_endpoint(
                Client,
                server_addr=(host, port),
                username=user,
                password=password,
                ssl=context,
                transport="udp" if transport == "udp" else "tcp",
            )
            break
        except stun.TransactionFailed as failure:
            # A port of ours on which an earlier client left an allocation: RFC 8656, section 7.4, says to take another,
            # which aioice leaves to us.
            code, _ = failure.response.attributes["ERROR-CODE"]
            if code != 437 or attempt == 4:
                raise
    for number in range(PACKETS):
        data = bytes([number % 256]) * SIZES[number % len(SIZES)]
        endpoint.sendto(data, to)
        back, address = await asyncio.wait_for(client.received.get(), 20)
        assert (back, address) == (data, to), (number, len(back), address)
    relayed = endpoint.get_extra_info("sockname")
    endpoint.close()
    peer.close()
    print(f"{PACKETS} packets both ways over {transport}, relayed by {relayed[0]}")


host, port, transport, user, password = sys.argv[1:]
asyncio.run(main(host, int(port), transport, user, password))
