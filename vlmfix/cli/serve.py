"""`vlmfix serve`: methods behind the interface of OpenAI's chat completions."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from vlmfix.cli.console import METHOD_HELP, DeviceMap, Dtype, ModelName, Quantize, err, fail, load_model, sentences

STOP_S = 30
"""How long the last pass may take when the server stops."""


def serve(
    model: ModelName = "organism",
    method: Annotated[
        list[str] | None, typer.Option(help=METHOD_HELP + " Listed as models; the first is that of the bare name.")
    ] = None,
    only_listed: Annotated[bool, typer.Option("--only-listed", help="Refuse methods that are not listed.")] = False,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets your whole network in; give an API key then.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLMFIX_API_KEY", help="Clients must send it as their API key.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: the model's own.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in the queue; more are turned away.")] = 256,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Of a request, pictures included.")] = 64,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
) -> None:
    """Serve a model and its methods to any OpenAI client, as models NAME and NAME+METHOD."""
    with sentences():
        from vlmfix.method.registry import parse, split_methods

        specs = [spec for text in method or ["none,vhr"] for spec in split_methods(text)]
        for spec in specs:
            parse(spec)
        listener = _bound(host, port)
        import uvicorn

        from vlmfix.serve.app import build
        from vlmfix.serve.methods import Offer
        from vlmfix.serve.worker import Worker

        loaded, processor = load_model(model, dtype, device_map, quantize)
        worker = Worker(loaded, processor, max_batch=max_batch, max_waiting=max_waiting)
        for spec in specs:
            worker.asker(spec)  # a method that does not fit the model says so now
        called = name or (Path(model).name if Path(model).is_dir() else model)
        offer = Offer(called, tuple(specs), only_listed)
        app = build(worker, offer, api_key=api_key, max_body=max_body_mb * 1_000_000)
    address = f"http://{host}:{listener.getsockname()[1]}/v1"
    err.print(f"ready at {address} (Ctrl-C ends it); models:", soft_wrap=True, markup=False)
    for each in offer.models:
        err.print(f"  {each}", soft_wrap=True, markup=False)
    if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
        err.print("note: whoever reaches this address can use it; --api-key asks them for a key", soft_wrap=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)

    class Server(uvicorn.Server):
        """Tells whoever waits that it stops, before it does."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            worker.close()
            await super().shutdown(sockets)

    with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has stopped
        Server(config).run(sockets=[listener])
    worker.join(STOP_S)  # torch does not like to be left in the middle of a pass


def _bound(host: str, port: int) -> socket.socket:
    """The address, taken before the model is loaded, which may take minutes."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise fail(f"cannot listen at {host}:{port}: {error.strerror or error}; give another --port") from None
    return listener
