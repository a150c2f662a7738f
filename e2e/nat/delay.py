"""Holds up what is routed into a TUN device: delay.py DEVICE MILLISECONDS. The packets come out of it again, later."""
import collections
import fcntl
import os
import select
import struct
import sys
import time

device, delay = sys.argv[1], int(sys.argv[2]) / 1000
tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
print("ready", flush=True)
held = collections.deque()
while True:
    wait = max(0, held[0][0] - time.monotonic()) if held else None
    readable, _, _ = select.select([tun], [], [], wait)
    if readable:
        held.append((time.monotonic() + delay, os.read(tun, 65536)))
    while held and held[0][0] <= time.monotonic():
        os.write(tun, held.popleft()[1])
