import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tessera.router.metrics.instruments import Histogram, Registry


def samples(registry: Registry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = "".join(f"{line}\n" for line in registry.lines())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_histogram_counts_up_to_and_including_each_bound() -> None:
    histogram = Histogram([1, 2.5, 10])
    for value in (0, 1, 1.0001, 2.5, 10, 10.5, 1e9):
        histogram.observe(value)
    assert list(histogram.samples()) == [
        ("_bucket", "1.0", 2),
        ("_bucket", "2.5", 4),
        ("_bucket", "10.0", 5),
        ("_bucket", "+Inf", 7),
        ("_count", "", 7),
        ("_sum", "", 0 + 1 + 1.0001 + 2.5 + 10 + 10.5 + 1e9),
    ]
    histogram.place([7])
    assert next(iter(histogram.samples())) == ("_bucket", "7.0", 0)


def test_the_library_reads_what_is_written() -> None:
    registry = Registry()
    registry.counter("plain_total", "Of one series").increase(2)
    hostile = 'a"b\\c\nd{e="f"} 1'
    registry.counters("several_total", "Of many", "route", "status").of(hostile, "200").increase()
    registry.gauge("level", "Up and down").set(0.5)
    registry.histogram("spread", "Over buckets", [0.00015, 1]).observe(0.5)
    assert samples(registry) == {
        ("plain_total", frozenset()): 2,
        ("several_total", frozenset({("route", hostile), ("status", "200")})): 1,
        ("level", frozenset()): 0.5,
        ("spread_bucket", frozenset({("le", "0.00015")})): 0,
        ("spread_bucket", frozenset({("le", "1.0")})): 1,
        ("spread_bucket", frozenset({("le", "+Inf")})): 1,
        ("spread_count", frozenset()): 1,
        ("spread_sum", frozenset()): 0.5,
    }


def test_a_counter_keeps_the_name_it_was_given() -> None:
    registry = Registry()
    registry.counter("plain", "Without the ending the library adds").increase()
    assert list(registry.lines())[1:] == ["# TYPE plain counter", "plain 1"]


def test_numbers_lose_nothing() -> None:
    registry = Registry()
    gauge = registry.gauge("bytes", "Many")
    for number in (2**53 - 1, 1e300, 1e-300, 0.1, math.inf):
        gauge.set(number)
        assert samples(registry) == {("bytes", frozenset()): number}


def test_a_name_is_defined_once() -> None:
    registry = Registry()
    registry.counter("once", "Fine")
    with pytest.raises(ValueError, match="once"):
        registry.gauge("once", "Not fine")
