"""The real launcher around stub processes."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from tessera.launcher.devices import Devices
from tessera.launcher.main import main
from tessera.launcher.plan import Place, ProcessSpec, plan_processes
from tessera.launcher.settings import Settings

STUB = str(Path(__file__).with_name("stub_process.py"))


def planner(settings: Settings, devices: Devices, place: Place) -> list[ProcessSpec]:
    return [
        replace(spec, argv=(sys.executable, STUB, spec.name))
        for spec in plan_processes(settings, devices, place)
    ]


if __name__ == "__main__":
    # Not what the tests themselves were started with.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if "NOHUP" in os.environ else signal.SIG_DFL)
    sys.exit(main(planner=planner))
