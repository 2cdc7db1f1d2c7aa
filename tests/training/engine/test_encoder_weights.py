import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, Dinov2Config, Dinov2Model

from hf_efficientsam import (
    EfficientSamBackbone,
    EfficientSamForImageClassification,
    EfficientSamForPreTraining,
    EfficientSamImageProcessor,
    EfficientSamSamiConfig,
    EfficientSamVisionConfig,
    EfficientSamVisionModel,
)
from hf_efficientsam.training.engine.encoder_weights import (
    load_around_encoder,
    load_encoder,
    select_encoder,
    select_weights,
)


def make_teacher(**config):
    """Tiny, with random numbers everywhere, layer scales and biases too."""
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "patch_size": 16, "image_size": 64}
    teacher = Dinov2Model(Dinov2Config(**{**tiny, **config})).eval()
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return teacher


def make_student(**config):
    tiny = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "pretrain_image_size": 64}
    return EfficientSamVisionModel(EfficientSamVisionConfig(**{**tiny, **config})).vision_encoder.eval()


@pytest.fixture
def pretraining(tmp_path):
    vision = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "pretrain_image_size": 64}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    model = EfficientSamForPreTraining(EfficientSamSamiConfig(vision_config=vision, **decoder))
    model.half().save_pretrained(tmp_path / "sami")
    return tmp_path / "sami"


def grid_of_patches(encoder, pixel_values):
    tokens = encoder.embeddings(pixel_values)
    for layer in encoder.layers:
        tokens = layer(tokens)
    return tokens


@torch.no_grad()
def test_a_teacher_of_the_same_size_is_reproduced_exactly():
    teacher, student = make_teacher(), make_student()
    select_weights(teacher, student)
    pixel_values = torch.randn(2, 3, 64, 64)
    tokens = teacher.embeddings(pixel_values)[:, 1:]  # without the class token, which the student does not have
    assert torch.allclose(student.embeddings(pixel_values), tokens, atol=1e-5)
    for layer in teacher.encoder.layer:
        tokens = layer(tokens)
    assert torch.allclose(grid_of_patches(student, pixel_values), tokens, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_half_the_width_takes_every_second_channel_head_and_unit():
    teacher, student = make_teacher(), make_student(hidden_size=8, num_attention_heads=2)
    select_weights(teacher, student)
    theirs, ours = teacher.encoder.layer[1], student.layers[1]
    channels = [0, 2, 4, 6, 8, 10, 12, 14]
    heads = [0, 1, 2, 3, 8, 9, 10, 11]  # the first and the third of four heads of 4 channels
    assert torch.equal(ours.layernorm_after.bias, theirs.norm2.bias[channels])
    assert torch.equal(ours.attention.k_proj.weight, theirs.attention.k_proj.weight[heads][:, channels])
    assert torch.equal(ours.attention.v_proj.bias, theirs.attention.v_proj.bias[heads])
    scale = theirs.layer_scale1.lambda1[channels]
    expected = theirs.attention.o_proj.weight[channels][:, heads] * scale[:, None]
    assert torch.allclose(ours.attention.o_proj.weight, expected)
    assert torch.allclose(ours.attention.o_proj.bias, theirs.attention.o_proj.bias[channels] * scale)
    assert torch.equal(ours.mlp.fc1.weight, theirs.mlp.fc1.weight[::2, ::2])
    expected = theirs.mlp.fc2.weight[::2, ::2] * theirs.layer_scale2.lambda1[::2, None]
    assert torch.allclose(ours.mlp.fc2.weight, expected)
    assert torch.equal(student.embeddings.projection.bias, teacher.embeddings.patch_embeddings.projection.bias[::2])
    table = teacher.embeddings.position_embeddings[..., ::2]
    assert torch.allclose(student.embeddings.position_embeddings, table, atol=1e-6)


@torch.no_grad()
def test_another_patch_size_keeps_the_size_of_the_responses():
    teacher, student = make_teacher(patch_size=14, image_size=56), make_student()
    kernel = teacher.embeddings.patch_embeddings.projection.weight
    kernel.copy_(kernel.mean((2, 3), keepdim=True).expand_as(kernel))
    select_weights(teacher, student)
    theirs = teacher.embeddings.patch_embeddings(torch.full((1, 3, 56, 56), 0.7))
    tokens = student.embeddings(torch.full((1, 3, 64, 64), 0.7)) - student.embeddings.position_embeddings[:, 1:]
    assert torch.allclose(tokens, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_position_table_is_resampled_and_its_class_row_kept():
    teacher, student = make_teacher(image_size=128), make_student()
    table = teacher.embeddings.position_embeddings  # 8 x 8 cells: a slope along x
    x = (torch.arange(8) + 0.5) / 8
    table[0, 1:] = x.repeat(8)[:, None]
    select_weights(teacher, student)
    ours = student.embeddings.position_embeddings
    assert torch.equal(ours[:, 0], table[:, 0])
    rows = ours[0, 1:].unflatten(0, (4, 4))
    assert torch.allclose(rows[:, 1:3], (((torch.arange(4) + 0.5) / 4)[1:3, None]).expand(4, 2, 16), atol=0.01)


def test_the_neck_is_left_alone():
    student = make_student()
    before = {name: value.clone() for name, value in student.neck.state_dict().items()}
    select_weights(make_teacher(), student)
    assert all(torch.equal(value, before[name]) for name, value in student.neck.state_dict().items())


@torch.no_grad()
def test_an_encoder_of_ours_gives_the_same_part_as_the_vit_that_it_came_from():
    teacher, whole = make_teacher(), make_student()
    select_weights(teacher, whole)
    half, expected = (make_student(hidden_size=8, num_attention_heads=2) for _ in range(2))
    select_encoder(whole, half)
    select_weights(teacher, expected)
    ours, theirs = half.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("neck."))
    assert torch.equal(half.neck.projection.weight, whole.neck.projection.weight[:, ::2])
    assert torch.equal(half.neck.conv.weight, whole.neck.conv.weight)
    with pytest.raises(ValueError, match="choose a teacher"):
        select_encoder(whole, make_student(hidden_size=8, num_attention_heads=4))


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 24},
        {"num_attention_heads": 2},
        {"num_hidden_layers": 3},
        {"mlp_ratio": 2},
        {"hidden_size": 8, "num_attention_heads": 2},
        {"use_swiglu_ffn": True},
        {"qkv_bias": False},
    ],
    ids=str,
)
def test_a_teacher_that_does_not_fit(config):
    student = make_student()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(ValueError, match="choose a teacher"):
        select_weights(make_teacher(**config), student)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.slow
@torch.no_grad()
def test_the_small_size_starts_with_the_features_of_a_trained_teacher(shared):
    teacher = AutoModel.from_pretrained(shared / "weights" / "vit-small-patch14-teacher").eval()
    config = EfficientSamVisionConfig(hidden_size=384, num_attention_heads=6)
    student = EfficientSamVisionModel(config).vision_encoder.eval()
    select_weights(teacher, student)
    path = sorted((shared / "data" / "coco-val-dev" / "images").glob("*.jpg"))[0]
    image = Image.open(path).convert("RGB")
    ours, theirs = (
        EfficientSamImageProcessor(size=size, size_divisor=1)(image)["pixel_values"] for size in (448, 392)
    )
    features = teacher.layernorm(grid_of_patches(student, ours))
    expected = teacher(theirs).last_hidden_state[:, 1:]
    assert features.shape == expected.shape  # both see 28 x 28 patches
    assert F.cosine_similarity(features, expected, dim=-1).mean() > 0.9


# ----------------------------------------------------------------------------------------- around an encoder


def test_new_parts_around_a_pretrained_encoder(pretraining):
    head = ["classifier.bias", "classifier.weight", "layernorm.bias", "layernorm.weight"]
    model, new = load_around_encoder(EfficientSamForImageClassification, str(pretraining), num_labels=3)
    assert type(model) is EfficientSamForImageClassification and model.dtype == torch.float32
    assert new == head and model.config.num_labels == 3
    backbone, new = load_around_encoder(EfficientSamBackbone, str(pretraining), pyramid_strides=[16])
    assert new == sorted(key for key in backbone.state_dict() if key.startswith("pyramid."))
    encoder, has_neck = load_encoder(str(pretraining))
    assert type(encoder) is EfficientSamVisionModel and not has_neck


def test_the_bundled_encoder_has_its_neck():
    encoder, has_neck = load_encoder("bundled")
    assert has_neck and encoder.config.image_size == 512


def test_a_classifier_of_other_classes_starts_new(pretraining, tmp_path):
    model, _ = load_around_encoder(EfficientSamForImageClassification, str(pretraining), num_labels=3)
    model.save_pretrained(tmp_path / "three")
    same, new = load_around_encoder(EfficientSamForImageClassification, str(tmp_path / "three"))
    assert not new and torch.equal(same.classifier.weight, model.classifier.weight)
    other, new = load_around_encoder(EfficientSamForImageClassification, str(tmp_path / "three"), num_labels=4)
    assert new == ["classifier.bias", "classifier.weight"] and other.classifier.weight.shape == (4, 16)
    assert torch.equal(other.layernorm.weight, model.layernorm.weight)


def test_an_encoder_that_cannot_be_loaded(pretraining, tmp_path):
    with pytest.raises(ValueError, match=r"^The encoder .*nowhere cannot be loaded"):
        load_around_encoder(EfficientSamBackbone, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"cannot be loaded.*classifier_pooling"):
        load_around_encoder(EfficientSamForImageClassification, str(pretraining), classifier_pooling="max")
    with pytest.raises(ValueError, match=r"cannot be loaded.*pyramid_strides"):
        load_around_encoder(EfficientSamBackbone, str(pretraining), pyramid_strides=[3])
    config = EfficientSamVisionConfig.from_pretrained(pretraining)
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"lacks weights of the encoder, such as vision_encoder\.layers\.2\."):
        load_around_encoder(EfficientSamForImageClassification, str(pretraining), config=config)
