"""Which limpet this is. Apart from everything else, so that every layer and the command line can ask cheaply."""

__version__ = "0.1.0"
PROTOCOL = 1  # of the HTTP API; client and daemon must agree
