"""Initial weights of a new mask decoder: untrained, it answers a prompt with the prompt's own shape.

With random initial weights a decoder spends most of a small training budget on learning where a box is. Here a few
channels and attention heads are set by formula, so that before the first step a box is answered with that box, a
foreground click with a disc around it, and a mask prompt with that mask. All other weights stay random; architecture
and checkpoint layout do not change, and every weight is trained as usual.

**Positions.** For a coordinate x in [0, 1] the Fourier features are sines and cosines of 2 pi f (2 x - 1). The first
`HARMONICS` frequencies of each axis are f = j / 8 with j = 1, 3, 5, ..., so that the phase difference of two places is
j (pi / 2) (x - y). Sums of products of these features are functions of the difference alone:

    step(x - y) = 4 / pi * sum_j sin(j (pi / 2) (x - y)) / j      a square wave: -1 left of y, 1 right of it
    near(x - y) = mean over j = 3, 5, 7 of cos(j (pi / 2) (x - y))    largest at y, without a second maximum as high

`STILL` more frequencies are 0: their sines are 0 everywhere, so those channels carry what a token or a cell is, not
where. The image embedding is almost 0 in all these channels ("quiet"), because the neck's last normalisation scales
them down; the first two-way layer's normalisations do the same to the tokens' own copy. Positions are added anew to
every query and key, and are therefore exact.

**Edges.** Four heads of the first image-to-token attention, one for each side of a box. A head gives the box corner
the logit z = -s step(x - corner) for the left and upper edge and z = s step(x - corner) for the other two, plus
log(number of output tokens); the output tokens (IoU and masks) have logit 0 and all others a very low one. After the
softmax the corner has weight sigmoid(z). Its value is -1 and the output tokens' 1, so the head writes
-tanh(z / 2) into its edge channel: positive on the inner side, negative on the outer one, 0 at the edge itself. The
gain s is proportional to the grid's side, which makes the ramp `LOGITS_PER_CELL` steep in every grid (of at least a
dozen cells a side: below, edges become softer). Without a box only output tokens are left and every cell is inside.

**Votes.** A fifth head gives each click the logit gain (near(dx) + near(dy)) + constant, which crosses that of the
output tokens at a distance of `DISC_RADIUS`. Values: foreground clicks 4, background clicks -4, output tokens -1, box
corners 1 with a logit above that of any click. The mask prompt adds 2 or -2. The sign of the sum is thus decided by
the nearest click if one is near, else by the mask prompt, else by whether there is a box; several clicks give the
union of their discs, and background clicks cut into it. In the mask prompt's encoder, whose normalisations run over
few channels, values travel as pairs (v, -v) beside a constant pair (b, -b): normalised they become
sqrt(2) v / sqrt(v^2 + b^2), an odd, saturating function of the mask logit. Each quarter of a cell has a vote of its
own.

**Upscaling.** The transposed convolutions carry each signal as the pair (v, -v), for
act(v) - act(-v) = v holds for GELU (and for ReLU, SiLU). An edge channel E is known at the cell's centre; at an offset
of d cells it is E + tanh(s step(d cells) / 2) K, where K is a channel that is constant, and so the edge lies at
the right quarter of a cell. The last convolution makes act(-4 E) of each edge and of the vote, which is large outside
and 0 inside, and act(K). Each hypernetwork's last bias is the filter that subtracts the first from the second:
a mask pixel is positive where all edges and the vote are.

Two heads of the first layer's token-to-image attention look at the cells near the token's own place, and two of every
later one at the cells that are inside, so that the tokens read the object from the first step on.
"""

import math
from itertools import chain

import torch
from torch import nn

from hf_efficientsam.model.modeling_efficientsam import EfficientSamAttention, EfficientSamModel

DISC_RADIUS = 1 / 8  # of the disc that answers a single click, as a fraction of the image's side

HARMONICS = 7  # odd ones: j = 1, 3, ..., 13
STILL = 8  # frequencies that are 0 on both axes
DISC_HARMONICS = (1, 2, 3)  # places among the harmonics of those that measure distance: j = 3, 5, 7
QUIET = 0.005  # scale of the image embedding in the channels that are set here
LOGITS_PER_CELL = 5.0  # steepness of the attention logit at an edge
LEAST_GAIN = 4.0  # what the logit at least comes to far from an edge, also where cells are large
DISC_LOGIT = 6.0  # by so much the logit at a click is above that on its disc's rim
NEVER = -100.0  # a logit that leaves no weight after the softmax
SIGNAL = 4.0  # size of a token's signal in units of its other channels' standard deviation
SIGNAL_AFTER_LAYER = 3.1  # what the first layer's three normalisations make of it, measured
EDGE_GAIN, VOTE_GAIN = 3.0, 1.5  # of what the heads write into the image
SHARPNESS, INSIDE, OUTSIDE = 4.0, 0.4, 0.8  # last convolution; filters of the constant and of edges and vote


class _Channels:
    """
    Which channels carry what, for a width.

    The features are `width / 2` sines followed by `width / 2` cosines, of one frequency each: the harmonics along x,
    those along y, the frequencies 0, and the rest. On the token side the zero sines are the kind of a token and its
    two signals; on the image side the ones of the zero frequencies' channels are edges, votes and a constant.
    """

    def __init__(self, width: int):
        half = width // 2
        self.sines = [list(range(axis * HARMONICS, (axis + 1) * HARMONICS)) for axis in (0, 1)]
        self.cosines = [[half + column for column in columns] for columns in self.sines]
        still = range(2 * HARMONICS, 2 * HARMONICS + STILL)
        self.top_left, self.bottom_right, self.click, self.padding, self.side, self.vote_of_token = still[:6]
        self.kinds = [self.top_left, self.bottom_right, self.click, self.padding]
        self.constant, self.vote = still[6:]
        self.edges = [half + column for column in still[:4]]  # left, top, right, bottom
        self.mask_votes = [half + column for column in still[4:]]  # of the quarters of a cell: y, then x
        self.places = [*chain(*self.sines), *chain(*self.cosines)]
        self.signals = [self.side, self.vote_of_token]
        self.image = [*self.edges, self.vote, self.constant, *self.mask_votes]
        self.quiet = [*self.places, *still, *self.edges, *self.mask_votes]


@torch.no_grad()
def set_geometric_weights(model: EfficientSamModel) -> None:
    """
    Sets a part of a new model's neck, prompt encoder and mask decoder so that untrained it answers a box with that
    box, a foreground click with a disc of radius `DISC_RADIUS`, and a mask prompt with that mask (thresholded at 0,
    at half its resolution). See the module's text for the formulas.

    Args:
        model: changed in place; its neck, prompt encoder and mask decoder must be new (the encoder may be trained).
            The edges are placed for square inputs of `model.config.vision_config.image_size`.

    Raises:
        ValueError: if the model is too small or of another activation; it is left as it was.
    """
    _check(model)
    channels = _Channels(model.config.mask_decoder_config.hidden_size)
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size
    decoder = model.mask_decoder
    _set_frequencies(model.prompt_encoder.position_embedding.frequencies)
    _silence_image(model.vision_encoder.neck.layernorm2, channels)
    _mark_tokens(model, channels)
    _protect_signals(decoder.layers[0], channels)
    for layer in decoder.layers:
        _clear(layer.image_to_token_attention.o_proj, rows=channels.image)
    _write_edges(decoder.layers[0].image_to_token_attention, channels, grid, 1 + decoder.mask_tokens.num_embeddings)
    _write_votes(decoder.layers[0].image_to_token_attention, channels, 1 + decoder.mask_tokens.num_embeddings)
    _look_at_own_place(decoder.layers[0].token_to_image_attention, channels)
    later = [layer.token_to_image_attention for layer in decoder.layers[1:]]
    for attention in (*later, decoder.final_token_to_image_attention):
        _look_inside(attention, channels)
    _carry_through_upscaling(decoder.upscaling.convs, channels, grid)
    for network in decoder.hypernetworks:
        _set_filter(network.layers[-1])
    if model.prompt_encoder.mask_embed is not None:
        _pass_mask_on(model.prompt_encoder, channels)


def _check(model: EfficientSamModel) -> None:
    config, prompt = model.config.mask_decoder_config, model.config.prompt_encoder_config
    head_dim = config.hidden_size // config.attention_downsample_rate // config.num_attention_heads
    least = {
        "hidden_size": (config.hidden_size, 2 * (2 * HARMONICS + STILL)),
        "num_attention_heads": (config.num_attention_heads, 5),
        "hidden_size / attention_downsample_rate / num_attention_heads": (head_dim, 2 * HARMONICS + 2),
        "upscaling_channels[0]": (config.upscaling_channels[0], 12),
        "upscaling_channels[-1]": (config.upscaling_channels[-1], 6),
    }
    if prompt.mask_prompts:
        least["mask_input_channels"] = (prompt.mask_input_channels, 16)
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(
                f"Geometric initial weights need {name} of at least {minimum}, and it is {value}; "
                "choose a larger decoder or random initial weights."
            )
    if len(config.upscaling_channels) != 2:
        raise ValueError(
            f"Geometric initial weights are made for two upscaling_channels, not {config.upscaling_channels}; "
            "choose two or random initial weights."
        )
    x = torch.linspace(-4, 4, 9)
    activations = [model.mask_decoder.upscaling.activation]
    if prompt.mask_prompts:
        activations.append(model.prompt_encoder.mask_embed.activation)
    if not all(torch.allclose(act(x) - act(-x), x, atol=1e-4) for act in activations):
        raise ValueError(
            f"Geometric initial weights need an activation with act(x) - act(-x) = x, such as gelu, and hidden_act is "
            f"{config.hidden_act!r} and {prompt.hidden_act!r}; choose gelu or random initial weights."
        )


def _clear(linear: nn.Linear, rows) -> None:
    linear.weight[rows] = 0
    linear.bias[rows] = 0


def _set_frequencies(frequencies: torch.Tensor) -> None:
    """Harmonics of each axis, frequencies 0, and the rest log-spaced along one axis, then along the other."""
    frequencies.zero_()
    rest = frequencies[:, 2 * HARMONICS + STILL :].tensor_split(2, dim=1)
    for axis in (0, 1):
        start = axis * HARMONICS
        frequencies[axis, start : start + HARMONICS] = torch.arange(1, 2 * HARMONICS, 2) / 8
        rest[axis][axis] = torch.logspace(-2, 4, rest[axis].shape[1], base=2)


def _silence_image(norm: nn.LayerNorm, channels: _Channels) -> None:
    norm.weight[channels.quiet] = QUIET
    norm.bias[channels.quiet] = 0


def _mark_tokens(model: EfficientSamModel, channels: _Channels) -> None:
    """Kind and signals of every token; the signals of a token are of one size after a normalisation."""
    encoder, decoder = model.prompt_encoder, model.mask_decoder
    tokens = {  # embedding: kind, side of an edge, vote
        encoder.padding_embed: (channels.padding, 0, 0),
        encoder.background_embed: (channels.click, 0, -4),
        encoder.foreground_embed: (channels.click, 0, 4),
        encoder.box_top_left_embed: (channels.top_left, -1, 1),
        encoder.box_bottom_right_embed: (channels.bottom_right, -1, 1),
        decoder.iou_token: (None, 1, -1),
        decoder.mask_tokens: (None, 1, -1),
    }
    if encoder.no_mask_embed is not None:
        encoder.no_mask_embed.weight[:, channels.quiet] = 0
    for embedding, (kind, side, vote) in tokens.items():
        if embedding is None:
            continue
        embedding.weight[:, channels.quiet] = 0
        variance = embedding.weight.var(dim=1, unbiased=False)
        if kind is not None:
            embedding.weight[:, kind] = 1
            variance = variance + 0.5  # of the sines and cosines that are added
        size = SIGNAL * variance.sqrt()
        embedding.weight[:, channels.side] = side * size
        embedding.weight[:, channels.vote_of_token] = vote * size / 2


def _protect_signals(layer: nn.Module, channels: _Channels) -> None:
    """In the first layer nothing but the normalisations changes the tokens' signals, and the rest is quiet."""
    quiet = [channel for channel in channels.quiet if channel not in channels.signals]
    for norm in (layer.layernorm1, layer.layernorm2, layer.layernorm3):
        norm.weight[quiet] = QUIET
    for linear in (layer.self_attention.o_proj, layer.token_to_image_attention.o_proj, layer.mlp.fc2):
        _clear(linear, rows=channels.signals)


def _head_rows(attention: EfficientSamAttention, head: int) -> slice:
    return slice(head * attention.head_dim, (head + 1) * attention.head_dim)


def _set_logits(
    attention: EfficientSamAttention, head: int, products: list[tuple[int, int, float]], key_bias: dict[int, float]
) -> None:
    """
    A head's attention logit becomes sum of amplitude * query[channel] * key[other channel] over `products`, plus the
    sum of value * key[channel] over `key_bias`, one dimension of the head for each product and one for the latter.
    """
    rows = _head_rows(attention, head)
    for linear in (attention.q_proj, attention.k_proj):
        _clear(linear, rows)
    unscaled = attention.head_dim**0.5  # attention divides by it
    for row, (query, key, amplitude) in enumerate(products, start=rows.start):
        attention.q_proj.weight[row, query] = amplitude * unscaled
        attention.k_proj.weight[row, key] = 1
    row = rows.start + len(products)
    attention.q_proj.bias[row] = unscaled
    for channel, value in key_bias.items():
        attention.k_proj.weight[row, channel] = value


def _step(distance: float) -> float:
    """The square wave at a distance from the edge, as a fraction of the side; its slope there is 2 * HARMONICS."""
    harmonics = range(1, 2 * HARMONICS, 2)
    return 4 / math.pi * sum(math.sin(j * math.pi / 2 * distance) / j for j in harmonics)


def _edge_gain(grid: int) -> float:
    return max(LOGITS_PER_CELL * grid / (2 * HARMONICS), LEAST_GAIN)


def _write_edges(attention: EfficientSamAttention, channels: _Channels, grid: int, num_output_tokens: int) -> None:
    """Heads 0 to 3: left, top, right and bottom of a box."""
    gain = _edge_gain(grid)
    for head in range(4):
        axis, sign = head % 2, -1 if head < 2 else 1
        own = channels.top_left if head < 2 else channels.bottom_right
        products = []
        for place, (sine, cosine) in enumerate(zip(channels.sines[axis], channels.cosines[axis], strict=True)):
            amplitude = sign * gain * 4 / math.pi / (2 * place + 1)
            # sin(cell - corner) = sin(cell) cos(corner) - cos(cell) sin(corner)
            products += [(sine, cosine, amplitude), (cosine, sine, -amplitude)]
        key_bias = dict.fromkeys(channels.kinds, NEVER) | {own: math.log(num_output_tokens)}
        _set_logits(attention, head, products, key_bias)
        rows = _head_rows(attention, head)
        _clear(attention.v_proj, rows)
        attention.v_proj.weight[rows.start, channels.side] = 1
        attention.o_proj.weight[channels.edges[head], rows.start] = EDGE_GAIN
        if head == 0:  # the weights of a head add up to one, so this is the same in all cells
            attention.v_proj.bias[rows.start + 1] = 1
            attention.o_proj.weight[channels.constant, rows.start + 1] = EDGE_GAIN


def _write_votes(attention: EfficientSamAttention, channels: _Channels, num_output_tokens: int) -> None:
    """Head 4: foreground and background clicks, box or none."""
    harmonics = [2 * place + 1 for place in DISC_HARMONICS]

    def near(distance: float) -> float:
        return sum(math.cos(j * math.pi / 2 * distance) for j in harmonics) / len(harmonics)

    gain = DISC_LOGIT / (1 - near(DISC_RADIUS))
    products = [
        (channel, channel, gain / len(harmonics))
        for axis in (0, 1)
        for place in DISC_HARMONICS
        for channel in (channels.sines[axis][place], channels.cosines[axis][place])
    ]
    # On the rim the click's 4 meets the output tokens' -1.
    rim = math.log(num_output_tokens / 4) - gain * (1 + near(DISC_RADIUS))
    # A corner has places too; its logit stays above a click's wherever the cell lies.
    lowest = 2 * min(near(step / 100) for step in range(101))
    above = 2 * gain + rim + 4 - gain * lowest
    key_bias = {
        channels.click: rim,
        channels.top_left: above,
        channels.bottom_right: above,
        channels.padding: NEVER,
    }
    _set_logits(attention, 4, products, key_bias)
    rows = _head_rows(attention, 4)
    _clear(attention.v_proj, rows)
    attention.v_proj.weight[rows.start, channels.vote_of_token] = 1
    attention.o_proj.weight[channels.vote, rows.start] = VOTE_GAIN


def _look_at_own_place(attention: EfficientSamAttention, channels: _Channels) -> None:
    """Two heads in which a token attends to the cells near its place."""
    products = [
        (channel, channel, 1.2)
        for axis in (0, 1)
        for place in (1, 3, 6)  # j = 3, 7, 13: from wide to narrow
        for channel in (channels.sines[axis][place], channels.cosines[axis][place])
    ]
    for head in (0, 1):
        _set_logits(attention, head, products, {})


def _look_inside(attention: EfficientSamAttention, channels: _Channels) -> None:
    """Two heads in which every token attends to the cells on the inner side of all edges, with a positive vote."""
    for head in (0, 1):
        _set_logits(attention, head, [], dict.fromkeys([*channels.edges, channels.vote], 0.8))


def _carry_through_upscaling(convs: nn.ModuleList, channels: _Channels, grid: int) -> None:
    """Pairs 0 to 3 are the edges, 4 the vote, 5 the constant; after the last convolution one channel each."""
    first, last = convs
    first.weight[channels.image] = 0
    first.weight[:, :12] = 0
    first.bias[:12] = 0
    last.weight[:12] = 0
    last.weight[:, :6] = 0
    last.bias[:6] = 0
    # Offsets of 3/8 and 1/8 of a cell from the centre are 1/4 +- 1/8.
    far, close = (math.tanh(_edge_gain(grid) * _step(offset / grid) / 2) for offset in (3 / 8, 1 / 8))
    quarter, eighth = (SIGNAL_AFTER_LAYER * both / 2 for both in (far + close, far - close))
    # Where an edge is 0, the constant's positive filter would still win, up to E = -INSIDE / OUTSIDE K. So E is moved
    # by that, less a factor for what distinguishes GELU from ReLU: with it untrained boxes are as large as asked for.
    shift = 0.7 * INSIDE / OUTSIDE
    for y in (0, 1):
        for x in (0, 1):
            for edge, channel in enumerate(channels.edges):
                direction = (1 if edge < 2 else -1) * (2 * (x, y)[edge % 2] - 1)  # 1: towards the inner side
                for output, sign in ((2 * edge, 1), (2 * edge + 1, -1)):
                    first.weight[channel, output, y, x] = sign
                    first.weight[channels.constant, output, y, x] = sign * direction * quarter
                last.weight[2 * edge : 2 * edge + 2, edge, y, x] = SHARPNESS * torch.tensor([-1.0, 1.0])
                offset = SHARPNESS * (shift - direction * eighth)
                last.weight[10:12, edge, y, x] = offset * torch.tensor([1.0, -1.0])
            for output, sign in ((8, 1), (9, -1)):
                first.weight[[channels.vote, channels.mask_votes[2 * y + x]], output, y, x] = sign
                first.weight[channels.constant, output + 2, y, x] = sign
            last.weight[8:10, 4, y, x] = SHARPNESS * torch.tensor([-1.0, 1.0])
            last.weight[10:12, 4, y, x] = SHARPNESS * shift * torch.tensor([1.0, -1.0])
            last.weight[10:12, 5, y, x] = SHARPNESS * torch.tensor([1.0, -1.0])


def _set_filter(linear: nn.Linear) -> None:
    """The filter is almost the same for every prompt: constant minus what is outside, and little of the rest."""
    linear.weight[:6] *= 0.05
    linear.weight[6:] *= 0.15
    linear.bias.zero_()
    linear.bias[:5] = -OUTSIDE
    linear.bias[5] = INSIDE


def _pass_mask_on(encoder: nn.Module, channels: _Channels) -> None:
    """The mask's logits as votes of the four quarters of a cell."""
    embed = encoder.mask_embed
    embed.conv1.weight[4:] *= 0.1
    embed.conv1.weight[:4] = 0
    embed.conv1.weight[0], embed.conv1.weight[1] = 0.25, -0.25  # the mean of 2 x 2 logits
    embed.conv1.bias.zero_()
    embed.conv1.bias[2], embed.conv1.bias[3] = 1, -1
    embed.conv2.weight[10:] *= 0.1
    embed.conv2.weight[:10] = 0
    embed.conv2.bias.zero_()
    for quarter in range(4):
        y, x = divmod(quarter, 2)
        embed.conv2.weight[2 * quarter, :2, y, x] = torch.tensor([1.0, -1.0])
        embed.conv2.weight[2 * quarter + 1, :2, y, x] = torch.tensor([-1.0, 1.0])
    embed.conv2.bias[8], embed.conv2.bias[9] = 1, -1
    _clear(embed.projection, channels.quiet)
    amount = VOTE_GAIN * SIGNAL_AFTER_LAYER / math.sqrt(2)  # a vote of 2: a token's vote of v leaves v / 2 of these
    for quarter, channel in enumerate(channels.mask_votes):
        embed.projection.weight[channel, 2 * quarter : 2 * quarter + 2] = amount * torch.tensor([1.0, -1.0])
