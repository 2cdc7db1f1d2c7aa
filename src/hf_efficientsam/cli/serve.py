"""`efficientsam serve`: serves the HTTP API."""

from typing import Annotated

import typer

from hf_efficientsam.inference.uploads import MAX_PIXELS

from .options import Device, DeviceOption, Dtype, DtypeOption, HostOption, MaxPixelsOption, ModelOption, new_commands

commands = new_commands()


@commands.command("serve")
def serve_command(
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_images: Annotated[int, typer.Option(min=1, help="Keep at most this many encoded images.")] = 64,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Keep at most this much of encoded images.")] = 1024,
) -> None:
    """
    Serve an HTTP API until Ctrl+C: an image is sent and encoded once, and can then be segmented many times.

    /openapi.json describes it; /docs shows that as a page, whose scripts the browser loads from a network. Images stay
    in this computer's memory. There is no password: whoever reaches the port can use it.
    """
    try:
        from hf_efficientsam.serve.api import serve  # takes seconds to import, with torch
        from hf_efficientsam.serve.service import Service
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise ValueError(
            f'the API needs {error.name}; install it with pip install "hf-efficientsam[serve]".'
        ) from None
    serve(Service(model, device, dtype, max_pixels, max_images, max_megabytes * 2**20), host, port)
