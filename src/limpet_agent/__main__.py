"""Entry point. Run as a module, as a zip application or by the path of this file (PID 1 does the last)."""

import sys

if not __package__:
    sys.path.insert(0, __file__.rpartition("/")[0].rpartition("/")[0] or ".")

from limpet_agent.supervisor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
