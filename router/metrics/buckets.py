"""Where histograms divide what they count.

Those of `tgi_` metrics are text-generation-inference's, those of the others vLLM's and
OpenTelemetry's, with finer ones below for small models.
"""

# fmt: off
TGI_SECONDS = tuple(0.00015 * 1.5**k for k in range(35))  # 0.15 ms to 146 s

FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)

NEXT_TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)

REQUEST_S = (
    0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)

WORK_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# fmt: on

SEQUENCES = tuple(float(2**k) for k in range(11))  # 1 to 1024
STEP_TOKENS = tuple(float(2**k) for k in range(17))  # 1 to 65,536
SKIPPED_TOKENS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)


def hundredths(maximum: int) -> tuple[float, ...]:
    """text-generation-inference's buckets for tokens: a hundred equal ones up to a limit."""
    return tuple(maximum * k / 100 for k in range(1, 101))
