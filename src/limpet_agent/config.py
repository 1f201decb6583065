"""Where things are: in a virtual machine by default, elsewhere when the agent runs as an ordinary process (tests)."""

from __future__ import annotations

USAGE = "usage: limpet_agent [--listen SOCKET --state DIRECTORY [--intake FILE]]   (without options: be PID 1)"


class Config:
    """`listen` is set when the agent is an ordinary process that is reached over a Unix socket."""

    def __init__(self, listen: str | None, state: str, run: str, intake: str | None) -> None:
        self.listen, self.state, self.run, self.intake = listen, state, run, intake
        self.log = run + "/agent.log"
        self.marks = run + "/boot"  # data-ready, data-failed: left by the initramfs
        self.data = run + "/data"  # the data disk's file system, all of it
        self.autostart = state + "/runtime/autostart"  # while it is there, the container runtime comes with the machine
        self.sockets = run if listen is not None else "/run"  # of the runtime: not those of a machine that is not ours
        self.docker = self.sockets + "/docker.sock"
        self.tools = "/run/limpet/agent/bin"

    @property
    def local(self) -> bool:
        """Whether this is an ordinary process rather than PID 1 of a machine."""
        return self.listen is not None


def parse(argv: list[str]) -> Config:
    """The configuration that the command line asks for. Raises ValueError."""
    options = dict(zip(argv[::2], argv[1::2], strict=False))
    if len(argv) % 2 or set(options) - {"--listen", "--state", "--intake"}:
        raise ValueError(USAGE)
    listen, state = options.get("--listen"), options.get("--state")
    if listen is None:
        return Config(None, state or "/var/lib/limpet", "/run/limpet", None)
    if state is None:
        raise ValueError(USAGE)
    return Config(listen, state, state, options.get("--intake"))
