"""Which network addresses may be connected to because a client named them."""

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

_NAT64 = IPv6Network("64:ff9b::/96")
_UNICAST = IPv6Network("2000::/3")  # all of IPv6 that has been given out for the Internet

_NEVER = tuple(
    ip_network(text)
    for text in (
        "192.88.99.0/24",  # 6to4 relays
        "2002::/16",  # 6to4: any IPv4 address in disguise
        "2001::/23",  # Teredo and other protocols' own
        "3fff::/20",  # documentation
        "168.63.129.16",  # clouds' own services, metadata among them
        "100.100.100.200",
        "192.0.0.0/24",
        "fd00:ec2::/32",
        "fd20:ce::254",
    )
)
_PRIVATE = tuple(
    ip_network(text)
    for text in (
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "::1",
        "fc00::/7",
    )
)


def may_connect(text: str, *, allow_private: bool) -> bool:
    """Whether an address lies on the public Internet, IPv4 in IPv6 unwrapped.

    Args:
        text: what a resolver gave; anything but an IP address is refused.
        allow_private: loopback and private addresses too. Link-local ones, those of clouds'
            metadata services, multicast and reserved ones are refused all the same.
    """
    try:
        address = _unwrapped(ip_address(text))
    except ValueError:
        return False
    if any(address in network for network in _NEVER):
        return False
    if any(address in network for network in _PRIVATE):
        return allow_private
    if isinstance(address, IPv6Address) and address not in _UNICAST:
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _unwrapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address inside a mapped or NAT64 one. (An IPv6-only network reaches IPv4 so.)"""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address
