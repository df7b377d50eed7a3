"""`python -m tests.launcher.limited_warmup BYTES [FLAG...]`: the demo model's warm-up on a host
with so much memory for this process. Prints whether the server would start."""

import sys

from tessera.launcher.model_folder import DEMO_FOLDER
from tessera.launcher.settings import Settings
from tessera.proto.image_layout import layout_from_config
from tessera.router.limits import warmup_request
from tessera.router.model_files import ModelFiles
from tessera.router.shards import ShardsInfo
from tessera.shard.backends import load_backend
from tessera.shard.engine import Engine
from tessera.shard.errors import DeviceError
from tessera.shard.models import load_model, resolve_dtype
from tessera.shard.models.base import Placement
from tessera.shard.models.config_file import read_config
from tessera.shard.parallel import Group
from tessera.shard.warmup import warm_up


def starts(memory: int, settings: Settings) -> bool:
    config = read_config(DEMO_FOLDER)
    backend = load_backend("cpu", "auto")
    placement = Placement(backend, Group(), resolve_dtype("auto", config, "cpu"))
    engine = Engine(load_model(DEMO_FOLDER, placement), placement, settings.shard.block_size)
    free = memory - backend.used_memory_bytes()
    backend.free_memory_bytes = lambda: free  # type: ignore[method-assign]
    info = ShardsInfo("llava_next", "bfloat16", "cpu", "cpu", settings.shard.block_size, 832, 1)
    request = warmup_request(settings.router, info, ModelFiles.read(DEMO_FOLDER))
    fraction, layout = settings.shard.cuda_memory_fraction, layout_from_config(config)
    try:
        warm_up(engine, request, fraction, layout)
    except DeviceError as error:
        print(error, file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    told = starts(int(sys.argv[1]), Settings.read(sys.argv[2:], {}))
    print("starts" if told else "refuses")
