"""The command `limpet`: parses, calls the client, prints. One module per group of commands, loaded when called."""
