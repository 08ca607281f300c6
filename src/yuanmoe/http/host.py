"""Which hosts are this machine: a server without keys answers to no other name, so that no web page gets in by one."""

from ipaddress import ip_address


def names_this_machine(host: str) -> bool:
    """Whether a host, a port behind it or not, is `localhost` or a loopback address."""
    return any(_is_loopback(name) for name in (host, host.rpartition(":")[0]))


def _is_loopback(name: str) -> bool:
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
