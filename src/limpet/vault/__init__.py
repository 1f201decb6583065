"""The vault: what a sandbox wrote, as generations on the host, independent of its disks."""
