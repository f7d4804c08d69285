"""How a host is changed, where pyinfra has no operation of its own for it."""
