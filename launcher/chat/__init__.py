"""A chat with a running server in the terminal, pictures included: tessera-chat."""
