"""Run by the host's Python: queues the prompt on standard input, prints as JSON the texts that nodes show meanwhile."""

import asyncio
import json
import struct
import sys

import aiohttp

TEXT = 3  # the host's number for a text of a running node


async def texts(url, prompt):
    found = []
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/ws?clientId=test") as socket:
        answer = await session.post(f"{url}/prompt", json={"prompt": prompt, "client_id": "test"})
        ticket = (await answer.json())["prompt_id"]
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                kind, length = struct.unpack(">II", message.data[:8])
                if kind == TEXT:
                    found.append(message.data[8 + length :].decode())
            elif message.type == aiohttp.WSMsgType.TEXT:
                event = json.loads(message.data)
                ended = event["type"] in ("execution_success", "execution_error")
                if ended and event["data"]["prompt_id"] == ticket:
                    return found
    return found


sys.stdout.write(json.dumps(asyncio.run(asyncio.wait_for(texts(sys.argv[1], json.loads(sys.stdin.read())), 60))))
