"""QEMU: everything between "this sandbox should run" and a process that does.

    command   MachineSpec → argument vector, as data; nothing is started here
    accel     does KVM work here, and how fast does the time-stamp counter tick
    disks     overlays, the intake disk, and what they use
    network   user-mode network through passt, without a way to the host's loopback
    lock      the lock that QEMU holds: what "running" means
    machine   start, adopt, talk to, measure and end one QEMU process
    logs      bounded console logs, and why a machine died

Nothing here knows sandboxes, the agent or images: paths and numbers come in, a `Machine` comes out.
"""
