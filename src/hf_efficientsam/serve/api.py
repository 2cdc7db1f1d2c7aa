"""The HTTP API: its paths, what they take and return, and the server."""

import socket
from collections.abc import Sequence
from typing import Annotated, Literal

import uvicorn
from fastapi import FastAPI, HTTPException, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_efficientsam import __version__
from hf_efficientsam.inference.image_files import describe_error
from hf_efficientsam.inference.uploads import MAX_FILE_BYTES, MAX_OBJECTS, MAX_POINTS, MAX_POINTS_PER_SIDE

from .service import Service, UnknownImage, annotation_of

Point = Annotated[list[float], Field(min_length=2, max_length=2, description="x, y")]
Box = Annotated[list[float], Field(min_length=4, max_length=4, description="x1, y1, x2, y2")]


class Problem(BaseModel):
    detail: str = Field(description="What is wrong, in one sentence.")


class ModelDescription(BaseModel):
    name: str = Field(description='Directory or Hub name; "bundled" is the checkpoint in the package.')
    device: str
    dtype: str
    background_points: bool = Field(description="Whether points may have the label 0.")
    max_pixels: int = Field(description="Most pixels of an image.")
    max_file_bytes: int = MAX_FILE_BYTES
    max_objects: int = MAX_OBJECTS
    max_points: int = MAX_POINTS


class EncodedImage(BaseModel):
    id: str = Field(description="SHA-256 of the file: the same image sent again is not encoded again.")
    width: int = Field(description="In pixels of the upright image, as all coordinates are.")
    height: int


class MaskFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal["rle", "polygons"] = "rle"
    tolerance: float = Field(
        0,
        ge=0,
        le=100,
        description="Of polygons: largest distance in pixels of a corner that is left out; 0 is exact.",
    )


class Prompts(MaskFormat):
    points: list[Point] = []
    labels: list[Literal[0, 1]] | None = Field(
        None, description="Of each point: 1 on the object, 0 on the background; by default all are 1."
    )
    boxes: list[Box] = Field([], description="An object each. Points then belong to the box around them.")
    separate_points: bool = Field(False, description="Each point on an object is an object of its own.")
    candidates: bool = Field(False, description="All candidate masks of each object, the most confident first.")


class Everything(MaskFormat):
    points_per_side: int = Field(MAX_POINTS_PER_SIDE, ge=1, le=MAX_POINTS_PER_SIDE)
    pred_iou_thresh: float | None = Field(None, description="Least predicted IoU; by default the checkpoint's.")
    stability_score_thresh: float | None = Field(None, description="Least stability; by default the checkpoint's.")


class Rle(BaseModel):
    size: tuple[int, int] = Field(description="height, width")
    counts: str


class Mask(BaseModel):
    segmentation: Rle | list[list[float]] = Field(
        description="COCO's compressed RLE, or a polygon x1, y1, x2, y2, ... for each part: along the edges of the "
        "pixels, with bridges to holes."
    )
    area: int = Field(description="In pixels.")
    bbox: list[float] = Field(description="Of the mask: x, y, width, height.")
    score: float = Field(description="The model's own estimate of the mask's IoU with the true one, 0 to 1.")


class FoundObject(BaseModel):
    masks: list[Mask]


class Found(BaseModel):
    objects: list[FoundObject]
    warnings: list[str] = Field([], description="Sentences about prompts that were not taken as they were sent.")


SENT_TOO_MUCH = f"A request may have {MAX_FILE_BYTES // 2**20} MB; send a smaller file."
PROBLEMS = {
    404: {"model": Problem, "description": "No such image is kept: send it again."},
    413: {"model": Problem, "description": SENT_TOO_MUCH},
    422: {"model": Problem, "description": "Wrong input."},
}


class LimitBody:
    """Refuses a request while it arrives, once it is too large. FastAPI's own `max_body_size` answers without JSON."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def receive_part() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_FILE_BYTES:
                raise HTTPException(413, SENT_TOO_MUCH)
            return message

        await self.app(scope, receive_part, send)


def create_app(service: Service) -> FastAPI:
    """The application, for uvicorn or another ASGI server."""
    app = FastAPI(
        title="EfficientSAM",
        summary="Send an image once, then ask for masks by points and boxes.",
        version=__version__,
        responses=PROBLEMS,
    )
    app.add_middleware(LimitBody)
    app.add_exception_handler(UnknownImage, lambda _, error: problem(404, str(error)))
    app.add_exception_handler(RequestValidationError, lambda _, error: problem(422, first_of(error)))
    app.add_exception_handler(ValueError, lambda _, error: problem(422, describe_error(error)))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    @app.get("/model")
    async def model() -> ModelDescription:
        return ModelDescription(
            name=service.name,
            device=str(service.model.device),
            dtype=str(service.model.dtype).removeprefix("torch."),
            background_points=service.model.config.prompt_encoder_config.background_points,
            max_pixels=service.max_pixels,
        )

    @app.post("/images")
    def encode(file: UploadFile) -> EncodedImage:
        """Encodes an image. It is kept until it is deleted or others, asked about since, need its room."""
        name, predictor = service.encode(file.file.read(), file.filename or "The file")
        height, width = predictor.original_size
        return EncodedImage(id=name, width=width, height=height)

    @app.post("/images/{image_id}/masks")
    def segment(image_id: str, asked: Prompts) -> Found:
        """The masks of the objects that points and boxes show."""
        prompts = asked.model_dump(include={"points", "labels", "boxes"}, exclude_none=True)
        objects, warnings = service.segment(image_id, prompts, asked.separate_points, asked.candidates)
        return found(objects, asked, warnings)

    @app.post("/images/{image_id}/everything")
    def find_everything(image_id: str, asked: Everything) -> Found:
        """The masks of all objects, found from a grid of points."""
        options = asked.model_dump(exclude=set(MaskFormat.model_fields))
        return found(service.find_everything(image_id, **options), asked)

    @app.delete("/images/{image_id}", status_code=204)
    async def forget(image_id: str) -> None:
        """Forgets an image."""
        service.images.remove(image_id)

    return app


def found(objects: list[list[tuple]], asked: MaskFormat, warnings: Sequence[str] = ()) -> Found:
    """What `Service` found, in the form that was asked for."""
    form = asked.format == "polygons", asked.tolerance
    objects = [{"masks": [annotation_of(*mask, *form) for mask in masks]} for masks in objects]
    return Found(objects=objects, warnings=list(warnings))


def problem(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)


def first_of(error: RequestValidationError) -> str:
    """The first of the errors in a request, in one sentence."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}."


def serve(service: Service, host: str, port: int) -> None:
    """
    Serves the API until it is stopped.

    Raises:
        ValueError: the port cannot be had.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError:
        raise ValueError(f"port {port} of {host} cannot be had; choose another --port or --host.") from None
    print(f"Serving {service.name} at http://{host}:{port}", flush=True)
    with listening:
        uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning")).run([listening])
