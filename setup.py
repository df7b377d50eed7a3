"""Builds the CPU kernels where torch and a C++ compiler are present; see shard/backends/build.py."""

from setuptools import setup

setup()
