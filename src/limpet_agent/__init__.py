"""The guest agent: PID 1 and the far end of the channel. Standard library only: any image must be able to run it."""

VERSION = "0.1.0"
PROTOCOL = 1  # of the channel; host and guest must agree
