"""On PYTHONPATH with RUN_AHEAD, lets shards treat the processor as a device that runs ahead.

Launching a step computes it; who waits for it waits a little longer, as if the device were still
busy. The shards must compute with the reference backend. They log that a step was launched before
the one before it was finished.
"""

import os
import sys


def _run_ahead() -> None:
    import logging
    import time

    from tessera.proto import shard_pb2
    from tessera.shard.backends.reference import ReferenceBackend
    from tessera.shard.engine import Engine
    from tessera.shard.launched import Launched

    launch, finish = Engine.launch, Engine.finish
    under_way: list[int] = []

    def watched_launch(self: Engine, step: shard_pb2.Step) -> Launched:
        launched = launch(self, step)
        under_way.append(step.step_id)
        if len(under_way) > 1:
            logging.getLogger("tessera.shard").info("a step was launched ahead")
        return launched

    def watched_finish(self: Engine, launched: Launched) -> shard_pb2.StepReply:
        under_way.remove(launched.reply.step_id)
        return finish(self, launched)

    Engine.launch, Engine.finish = watched_launch, watched_finish  # type: ignore[method-assign]
    ReferenceBackend.runs_ahead = True
    ReferenceBackend.wait = lambda self, mark: time.sleep(0.003)  # type: ignore[method-assign]


if "tessera.shard.main" in sys.orig_argv and "RUN_AHEAD" in os.environ:
    _run_ahead()
