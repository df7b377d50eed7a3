"""The real question around the real launcher around stub processes."""

import sys
from pathlib import Path

from tessera.launcher.ask import main

if __name__ == "__main__":
    launcher = Path(__file__).with_name("stub_launcher.py")
    sys.exit(main(launcher=[sys.executable, str(launcher)]))
