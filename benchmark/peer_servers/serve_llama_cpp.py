"""llama.cpp's own HTTP server, in its own environment: `serve_llama_cpp.py FOLDER PORT STREAMS`."""

import sys
import threading
from pathlib import Path

import xllamacpp
from gguf_model import write_gguf

CONTEXT = 1024  # tokens of each stream


def main() -> None:
    folder, port, streams = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    path = folder / "model.gguf"
    if not path.exists():
        write_gguf(folder, path)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = streams
    params.n_ctx = streams * CONTEXT
    params.cont_batching = True
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
