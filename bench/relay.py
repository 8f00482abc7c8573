"""A TCP relay on the loopback that adds a delay each way, and nothing else: `relay.py PORT TO_PORT SECONDS`."""

import asyncio
import sys

CHUNK_BYTES = 256 << 10
WAITING_MAX = 1024  # chunks on the way


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Each chunk leaves `seconds` after it came, whatever comes meanwhile."""
    loop = asyncio.get_running_loop()
    on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(WAITING_MAX)

    async def deliver() -> None:
        while True:
            due, chunk = await on_the_way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not chunk:
                writer.close()
                return
            writer.write(chunk)
            await writer.drain()

    delivering = asyncio.create_task(deliver())
    try:
        while True:
            chunk = await reader.read(CHUNK_BYTES)
            await on_the_way.put((loop.time() + seconds, chunk))
            if not chunk:
                break
        await delivering
    except ConnectionError:
        writer.close()
    finally:
        delivering.cancel()


async def main(port: int, to_port: int, seconds: float) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", to_port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, far_writer, seconds), pump(far_reader, writer, seconds), return_exceptions=True)

    server = await asyncio.start_server(accept, "127.0.0.1", port, limit=CHUNK_BYTES)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    try:
        asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
    except KeyboardInterrupt:
        pass
