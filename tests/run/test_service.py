"""What one process opens, and what it says when part of it has ended."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from expediter.run.asking import Client, Local
from expediter.run.service import open_service
from expediter.run.serving import context_of
from expediter.settings import load_settings
from expediter.web import create_app


@pytest.mark.parametrize("part", ["committer", "worker", "housekeeping"])
async def test_liveness_is_503_once_background_work_has_ended(part: str, tmp_path: Path) -> None:
    """Whoever watches the process is told to restart it, and by what name the work is gone."""
    settings = load_settings(database_url=f"sqlite:///{tmp_path}/orders.db", drain_seconds=0.5)
    async with open_service(settings, working=True) as service:
        client = Client(Local(create_app(context_of(service, working=True)), "this process"))
        assert (await client.look("/healthz")).status == 200
        (task,) = (task for task in asyncio.all_tasks() if task.get_name() == part)
        task.cancel()
        await asyncio.wait([task])
        answer = await client.look("/healthz")
        assert (answer.status, answer.document["status"]) == (503, f"ended: {part}")
        assert part in (await client.look("/health")).document["dependencies"]["queue"]["detail"]
