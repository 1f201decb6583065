"""Host side of the guest: the channel, and a typed client of the agent. Every byte from the guest is hostile."""

from limpet.guest.agent import Agent, Completed
from limpet.guest.answers import Identity, Pong
from limpet.guest.execs import Exit, Gap, GuestExec, Output
from limpet.guest.mux import Channel, Data, Message, Stream

__all__ = [
    "Agent", "Channel", "Completed", "Data", "Exit", "Gap", "GuestExec", "Identity", "Message", "Output",
    "Pong", "Stream",
]  # fmt: skip
