"""Pools of workers: processes that are started, given tasks, and replaced when they die."""

from .worker_pool import WorkerPool

__all__ = ["WorkerPool"]
