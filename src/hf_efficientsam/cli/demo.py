"""`efficientsam demo`: serves the web page."""

from typing import Annotated

import typer

from hf_efficientsam.inference.uploads import MAX_PIXELS

from .options import Device, DeviceOption, Dtype, DtypeOption, HostOption, ModelOption, new_commands

commands = new_commands()


@commands.command("demo")
def demo_command(
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    detector: Annotated[
        str | None, typer.Option(metavar="DIR_OR_HUB_ID", help="Zero-shot object detector, to find objects by words.")
    ] = None,
    saliency: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_HUB_ID", help="Saliency model instead of the checkpoint's own head; may be .onnx."
        ),
    ] = None,
    host: HostOption = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen at; by default 7860 or the next free one.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Ask gradio's servers for a public link, too.")] = False,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Reduce images of more pixels than this; the API refuses them.")
    ] = MAX_PIXELS,
) -> None:
    """
    Serve a web page on which objects are cut out with the mouse, until Ctrl+C.

    The page needs no other network connection. Images stay in this computer's memory, each visitor's apart from all
    others', and are forgotten after an hour.
    """
    try:
        from hf_efficientsam.demo.page import launch_demo  # gradio takes seconds to import
        from hf_efficientsam.demo.service import Demo
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError('the page needs gradio; install it with pip install "hf-efficientsam[demo]".') from None
    launch_demo(Demo(model, detector, saliency, max_pixels, device, dtype), host, port, share)
