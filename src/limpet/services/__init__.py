"""What limpet does, one module a noun. Services know the store, the VMs and the guests; nothing here knows HTTP."""
