"""QEMU: everything between "this sandbox should run" and a process that does.

    command   MachineSpec → argument vector, as data; nothing is started here
    accel     does KVM work here, and how fast does the time-stamp counter tick
    disks     overlays, the intake disk, and what they use
    network   user-mode network through passt, without a way to the host
    gate      the process that keeps the guest's frames from the host's own addresses
    kernel    the kernel image, lent to QEMU while it loads
    lock      the lock that QEMU holds: what "running" means
    machine   start, adopt, talk to, measure and end one QEMU process
    handles   what another daemon needs to find it again
    qmp       QEMU's control socket
    stats     what a machine costs the host
    death     why it did not start, or is no more
    logs      bounded logs

Nothing here knows sandboxes, the agent or images: paths and numbers come in, a `Machine` comes out.
"""
