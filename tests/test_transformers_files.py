"""Mixers of vision encoders in files: saved by themselves and with the model, loaded strictly, resumed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from safetensors.torch import load_file, save_file

import vision_helpers as tiny
from gspn2.integrations.transformers import VisionMixers, mixers_of, mount, unmount
from processes import printed_by

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["ViT", "SiglipVision"])
def test_what_the_model_saves_loads_with_and_without_mixers(tmp_path, name):
    """As `Trainer` saves and resumes: the attentions are in there, under their names, and the mixers."""
    model = tiny.encoder(name)
    plain, kind = tiny.run(model, (4, 4)), type(model)
    mount(model, zero_output=False)
    model.save_pretrained(tmp_path)
    again, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(".mixer." in key for key in info["unexpected_keys"])
    torch.testing.assert_close(tiny.run(again.eval(), (4, 4)), plain)
    mount(again)
    assert again.load_state_dict(model.state_dict()) == ([], [])
    torch.testing.assert_close(tiny.run(again, (4, 4)), tiny.run(model, (4, 4)))
    unmount(again)
    torch.testing.assert_close(tiny.run(again, (4, 4)), plain)
    if name == "ViT":
        return  # whose files have the names of older versions
    # A training run that goes on has both from the file.
    other = tiny.encoder(name)
    for parameter in other.parameters():
        parameter.data.zero_()
    mount(other)
    assert other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True) == ([], [])
    torch.testing.assert_close(tiny.run(other, (4, 4)), tiny.run(model, (4, 4)))
    unmount(other)
    torch.testing.assert_close(tiny.run(other, (4, 4)), plain)


def test_saved_mixers_load_in_a_fresh_process(tmp_path):
    model = tiny.encoder("Dinov2WithRegisters")
    mixers = mount(model, zero_output=False, groups=2, readout="average")
    mixers.save_pretrained(tmp_path / "mixers")
    assert {path.name for path in (tmp_path / "mixers").iterdir()} == {"config.json", "model.safetensors"}
    torch.save(tiny.run(model, (4, 6)), tmp_path / "expected.pt")
    unmount(model).save_pretrained(tmp_path / "mixers")
    model.save_pretrained(tmp_path / "model")
    script = (
        "import sys, torch\n"
        "import vision_helpers as tiny\n"
        "from transformers import Dinov2WithRegistersModel\n"
        "from gspn2.integrations.transformers import VisionMixers, mount\n"
        "torch.set_num_threads(1)\n"
        "model = Dinov2WithRegistersModel.from_pretrained(sys.argv[1] + '/model').eval()\n"
        "mixers = VisionMixers.from_pretrained(sys.argv[1] + '/mixers')\n"
        "assert (mixers.config.groups, mixers.config.readout) == (2, 'average')\n"
        "mount(model, mixers)\n"
        "with torch.no_grad():\n"
        "    output = tiny.tokens(model, tiny.images((4, 6)))\n"
        "torch.testing.assert_close(output, torch.load(sys.argv[1] + '/expected.pt'))\n"
        "print('same')\n"
    )
    assert printed_by(script, tmp_path) == "same"


def test_automodel_reads_mixers(tmp_path):
    mount(tiny.encoder("ViT"), groups=2).save_pretrained(tmp_path)
    mixers = hf.AutoModel.from_pretrained(tmp_path)
    assert isinstance(mixers, VisionMixers)
    assert mixers.config.groups == 2


def test_backbones_of_ours_through_the_wrappers_of_timm(tmp_path):
    pytest.importorskip("timm")
    import gspn2.models  # noqa: F401  (registers them)

    config = hf.TimmWrapperConfig(architecture="test_gspn2", num_labels=3, model_args={"groups": 2})
    model = hf.TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    pixels = tiny.images((8, 8))
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    backbone = hf.TimmBackbone(hf.TimmBackboneConfig(backbone="test_gspn2", out_indices=[1, 3]))
    assert [tuple(maps.shape) for maps in backbone(pixels).feature_maps] == [(2, 32, 8, 8), (2, 64, 2, 2)]


def test_attentions_that_do_not_run_are_weights_all_the_same():
    """Sharded models' checkpoints look names up, and a strict load wants all of them."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model = tiny.encoder("SiglipVision")
    plain = tiny.run(model, (4, 4))
    mount(model)
    weights = {name: tensor.clone() for name, tensor in get_model_state_dict(model).items()}
    assert weights.keys() == model.state_dict().keys()
    other = tiny.encoder("SiglipVision")
    mount(other)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    set_model_state_dict(other, weights)
    unmount(other)
    assert torch.equal(tiny.run(other, (4, 4)), plain)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    del weights[name]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        model.load_state_dict(weights)
    assert model.load_state_dict(weights, strict=False).missing_keys == [name]


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "model"])
def test_loading_is_strict(tmp_path, fault):
    model = tiny.encoder("ViT")
    mount(model).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("to_proxy.weight"))
    if fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        weights["more.weight"] = torch.zeros(3)
    elif fault == "shape":
        weights[name] = weights[name][:, :-1].contiguous()
    else:
        unmount(model)
        model.save_pretrained(tmp_path)
    if fault != "model":
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="another model's config" if fault == "model" else "expected exactly"
    ):
        VisionMixers.from_pretrained(tmp_path)


def test_a_folder_without_mixers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json of a model is there"):
        VisionMixers.from_pretrained(tmp_path)


def test_mixers_of_an_encoder_fit_into_models_around_it(tmp_path):
    """Of a SigLIP, in the model with a text encoder, which stays as it is."""
    mount(tiny.encoder("SiglipVision"), zero_output=False).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = hf.SiglipModel(hf.SiglipConfig(vision_config=tiny.SIZES, text_config=tiny.TEXT)).eval()
    inputs = {"pixel_values": tiny.images((4, 4)), "input_ids": torch.arange(16).view(2, 8)}
    with torch.no_grad():
        before = model(**inputs)
        mount(model, VisionMixers.from_pretrained(tmp_path, dtype=torch.bfloat16))
        after = model(**inputs)
    assert all(name.startswith("vision_model.") for name in tiny.swapped(model))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(after.text_embeds, before.text_embeds)
    assert not torch.allclose(after.image_embeds, before.image_embeds)
    with pytest.raises(ValueError, match=r"32 channels at layers\.0\.attention, got no self-attention"):
        mount(tiny.encoder("ViT"), mixers_of(model))


def test_trainer_saves_and_resumes(tmp_path):
    """With nothing to help it: the run goes on with the mixers it had."""
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    data = [{"pixel_values": tiny.images((4, 4), 1)[0] * i, "labels": i % 3} for i in range(8)]

    def trainer(steps):
        torch.manual_seed(0)
        model = hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=tiny.SIZES, num_labels=3))
        mount(model)
        arguments = hf.TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return hf.Trainer(model, arguments, train_dataset=data)

    whole = trainer(4)
    whole.train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(dict(resumed.model.named_parameters())[name], parameter)
    plain = hf.SiglipForImageClassification.from_pretrained(tmp_path / "checkpoint-4").eval()
    unmount(whole.model)
    pixels = tiny.images((4, 4))
    torch.testing.assert_close(plain(pixels).logits, whole.model.eval()(pixels).logits)
