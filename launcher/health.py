"""`tessera-health`: whether the server of this container answers; for HEALTHCHECK and probes.

Imports little, for it is started every few seconds.
"""

import http.client
import os
import sys

TIMEOUT_S = 4.0


def main() -> int:
    """Ask `/health` of the server at PORT on this machine.

    Returns:
        0 when it answers 200; 1, with a line on stderr that says why, when it does not.
    """
    port, host = os.environ.get("PORT") or "3000", os.environ.get("HOSTNAME", "")
    if not port.isdigit():
        return _unhealthy(f"PORT={port!r} is no number")
    # A server that listens on all addresses, or on a name that is a container's id, is also here.
    address = host if _is_one_address(host) else "127.0.0.1"
    connection = http.client.HTTPConnection(address, int(port), timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return _unhealthy(f"port {port}: {error}")
    finally:
        connection.close()
    return 0 if status == 200 else _unhealthy(f"port {port}: /health answers {status}")


def _is_one_address(host: str) -> bool:
    numbers = host.split(".")
    is_ipv4 = len(numbers) == 4 and all(number.isdigit() for number in numbers)
    return (is_ipv4 or ":" in host) and host not in ("0.0.0.0", "::")


def _unhealthy(reason: str) -> int:
    print(f"not healthy: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
