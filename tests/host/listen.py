"""Run by the host's Python: writes the events of one kind that a client gets from the host until its prompt has ended.

python listen.py URL CLIENT_ID KIND FILE
"""

import asyncio
import json
import sys
from pathlib import Path

import aiohttp


async def main(url, client, kind, out):
    events = []
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/ws?clientId={client}") as socket:
        print("ready", flush=True)  # noqa: T201
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                event = json.loads(message.data)
                if event["type"] == kind:
                    events.append(event["data"])
                elif event["type"] in ("execution_success", "execution_error"):
                    break
    Path(out).write_text(json.dumps(events))


asyncio.run(main(*sys.argv[1:]))
