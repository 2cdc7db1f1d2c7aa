"""What holds for every model of the family, checked on all five in the same way."""

import copy

import pytest
import tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

B, HEIGHT, WIDTH = 2, 64, 80  # 4 x 5 patches
N = 20


class ModelTesterMixin:
    """Common checks. A subclass says how to build its model, what goes in and what comes out."""

    auto_class = AutoModel
    without_gradient = ("k_proj.bias",)  # endings of names: the softmax cancels the bias of the keys

    def model(self):
        """In evaluation mode, with weights that make every layer show in the output."""
        raise NotImplementedError

    def inputs(self) -> dict:
        """Arguments of forward, for B images of N patches."""
        raise NotImplementedError

    def outputs(self, output) -> tuple[torch.Tensor, ...]:
        """The tensors of an output that are compared."""
        raise NotImplementedError

    def hidden_state_shape(self) -> tuple[int, ...]:
        return (B, N, 24)

    def loss(self, model) -> torch.Tensor:
        return sum(tensor.float().square().mean() for tensor in self.outputs(model(**self.inputs())))

    def assert_same(self, output, expected, tolerance=1e-4):
        for ours, theirs in zip(self.outputs(output), self.outputs(expected), strict=True):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)

    @torch.no_grad()
    def test_saved_and_loaded_it_gives_the_same_output(self, tmp_path):
        model = self.model()
        model.save_pretrained(tmp_path)
        loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert not loaded.training
        self.assert_same(loaded(**self.inputs()), model(**self.inputs()), 0)
        assert type(self.auto_class.from_pretrained(tmp_path, trust_remote_code=False)) is type(model)

    @torch.no_grad()
    def test_eager_attention_equals_sdpa(self):
        model = self.model()
        assert model.config._attn_implementation == "sdpa"
        expected = model(**self.inputs())
        model.set_attn_implementation("eager")
        self.assert_same(model(**self.inputs()), expected)

    @torch.no_grad()
    def test_output_as_a_tuple_is_that_of_the_fields(self):
        model, inputs = self.model(), self.inputs()
        expected = model(**inputs).to_tuple()
        output = model(**inputs, return_dict=False)
        assert type(output) is tuple and len(output) == len(expected)

    @torch.no_grad()
    def test_hidden_states_and_attentions_are_recorded_when_asked_for(self):
        model, inputs = self.model(), self.inputs()
        model.set_attn_implementation("eager")
        plain, output = model(**inputs), model(**inputs, output_hidden_states=True, output_attentions=True)
        prefix = "vision_" if hasattr(output, "vision_hidden_states") else ""
        states, attentions = output[f"{prefix}hidden_states"], output[f"{prefix}attentions"]
        shape = self.hidden_state_shape()
        assert [tuple(state.shape) for state in states] == 3 * [shape]
        assert [tuple(weights.shape) for weights in attentions] == 2 * [(B, 3, shape[1], shape[1])]
        for weights in attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert f"{prefix}hidden_states" not in plain and f"{prefix}attentions" not in plain
        self.assert_same(output, plain)

    def test_every_parameter_gets_a_gradient(self):
        """DistributedDataParallel waits for those of all parameters."""
        model = self.model().train()
        self.loss(model).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            if not name.endswith(self.without_gradient):
                assert parameter.grad.abs().max() > 0, name

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_gives_the_same_gradients(self, use_reentrant):
        model = self.model().train()
        checkpointed = copy.deepcopy(model)
        checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:  # as the Trainer does: a checkpoint that is entered again needs an input with a gradient
            checkpointed.enable_input_require_grads()
        self.loss(model).backward()
        self.loss(checkpointed).backward()
        self.assert_same_gradients(checkpointed, model, lambda gradient: gradient)

    def test_sharded_layer_by_layer_it_has_the_same_gradients(self, tmp_path):
        """FSDP2 as accelerate sets it up: each of `_no_split_modules` by itself. One process shards as many do."""
        model = self.model()
        sharded = copy.deepcopy(model)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            for module in sharded.modules():
                if type(module).__name__ in sharded._no_split_modules:
                    fully_shard(module, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            for each in (model, sharded):
                self.loss(each).backward()
            self.assert_same_gradients(sharded, model, lambda gradient: gradient.full_tensor())
        finally:
            dist.destroy_process_group()

    def assert_same_gradients(self, model, expected, whole):
        for (name, parameter), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
            if wanted.grad is None:
                assert parameter.grad is None, name
                continue
            tolerance = 1e-4 * max(1.0, wanted.grad.abs().max().item())
            torch.testing.assert_close(whole(parameter.grad), wanted.grad, atol=tolerance, rtol=1e-3, msg=name)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
    @torch.no_grad()
    def test_half_precision_is_near_and_takes_float32_inputs(self, dtype, tolerance):
        model = self.model_for_half_precision()
        expected = model(**self.inputs())
        output = model.to(dtype)(**self.inputs())
        for ours, theirs in zip(self.outputs(output), self.outputs(expected), strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.float(), theirs, atol=tolerance, rtol=tolerance)

    def model_for_half_precision(self):
        """Weights as they start: enlarged ones would enlarge the rounding."""
        return self.model()


class TestModel(ModelTesterMixin):
    def model(self):
        return tiny.model()

    def inputs(self):
        corner = tiny.random(B, 3, 2, scale=30)
        return {
            "pixel_values": tiny.pixel_values(B, HEIGHT, WIDTH),
            "input_points": tiny.random(B, 3, 2, 2, scale=60),
            "input_labels": torch.tensor([1, 0]).expand(B, 3, 2),
            "input_boxes": torch.cat([corner, corner + 5 + tiny.random(B, 3, 2, scale=25)], dim=-1),
            "input_masks": 8 * tiny.random(B, 3, HEIGHT // 4, WIDTH // 4) - 4,
        }

    def outputs(self, output):
        return output.pred_masks, output.iou_scores

    def loss(self, model):
        """Of all prompts and none, several masks and one: each parameter has a part in one of them."""
        prompts, total = self.inputs(), 0
        pixel_values = prompts.pop("pixel_values")
        for given in (prompts, {}):
            for multimask_output in (True, False):
                output = model(pixel_values, **given, multimask_output=multimask_output)
                total = total + sum(tensor.square().mean() for tensor in self.outputs(output))
        return total


class TestForImageClassification(ModelTesterMixin):
    auto_class = AutoModelForImageClassification
    pooling = "mean"

    def model(self):
        model = self.model_for_half_precision()
        tiny.enlarge_weights(model)
        return model

    def model_for_half_precision(self):
        return tiny.classifier(classifier_pooling=self.pooling)

    def inputs(self):
        return {"pixel_values": tiny.pixel_values(B, HEIGHT, WIDTH)}

    def outputs(self, output):
        return (output.logits,)

    def hidden_state_shape(self):
        return (B, 1 + N, 24)


class TestForImageClassificationOfTheClassToken(TestForImageClassification):
    pooling = "cls"


class TestBackbone(ModelTesterMixin):
    auto_class = AutoBackbone

    def model(self):
        model = self.model_for_half_precision()
        tiny.enlarge_weights(model.vision_encoder)
        return model

    def model_for_half_precision(self):
        return tiny.backbone(pyramid_strides=[4, 8, 16, 32, 64], apply_layernorm=True)

    def inputs(self):
        return {"pixel_values": tiny.pixel_values(B, HEIGHT, WIDTH)}

    def outputs(self, output):
        return output.feature_maps

    def test_saved_and_loaded_it_gives_the_same_output(self, tmp_path, monkeypatch):
        # transformers asks the Hub even about a folder, whether timm's should be loaded in its place
        monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", lambda *args, **kwargs: True)
        super().test_saved_and_loaded_it_gives_the_same_output(tmp_path)


class TestForPreTraining(ModelTesterMixin):
    auto_class = AutoModelForPreTraining

    def model(self):
        return tiny.sami_model()

    def inputs(self):
        return {
            "pixel_values": tiny.pixel_values(B, HEIGHT, WIDTH),
            "target_features": 3 * tiny.random(B, N, 8) - 1,
            "noise": tiny.random(B, N),
        }

    def outputs(self, output):
        return (output.reconstruction,)

    def hidden_state_shape(self):
        return (B, 1 + N // 4, 24)


class TestSaliencyHead(ModelTesterMixin):
    def model(self):
        return tiny.saliency_head(initializer_range=0.3)

    def model_for_half_precision(self):
        return tiny.saliency_head()

    def inputs(self):
        return {"image_embeddings": 2 * tiny.random(B, tiny.CHANNELS, 4, 5) - 1}

    def hidden_state_shape(self):
        return (B, 2 * 3, 24)  # half the grid's sides, rounded up

    def outputs(self, output):
        return (output.logits,)
